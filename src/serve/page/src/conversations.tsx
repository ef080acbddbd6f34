// The list of conversations: choose, begin, rename, delete.
import { useEffect, useRef, useState } from "preact/hooks";
import { focusComposer } from "./chat";
import { changeConversation, conversations, createConversation, currentId, deleteConversation, type Conversation } from "./store";
import { running, stop } from "./talk";

const DAY = new Intl.DateTimeFormat("en", { month: "short", day: "numeric" });
const nameOf = (chat: Conversation) => chat.title || "New conversation";

function Renaming({ chat, done }: { chat: Conversation; done: () => void }) {
  const field = useRef<HTMLInputElement>(null);
  useEffect(() => field.current!.select(), []);
  const keep = (title: string) => {
    if (title.trim()) changeConversation(chat.id, () => ({ title: title.trim() }));
    done();
  };
  return (
    <li class="renaming">
      <input
        type="text"
        aria-label="Name of the conversation"
        ref={field}
        value={chat.title}
        onBlur={(event) => keep(event.currentTarget.value)}
        onKeyDown={(event) => {
          if (event.key === "Enter") keep(event.currentTarget.value);
          if (event.key !== "Escape") return;
          event.stopPropagation();
          done();
        }}
      />
    </li>
  );
}

function Item({ chat, onPick }: { chat: Conversation; onPick: () => void }) {
  const [renaming, setRenaming] = useState(false);
  const [sure, setSure] = useState(false);
  if (renaming) return <Renaming chat={chat} done={() => setRenaming(false)} />;
  const remove = () => {
    if (!sure) return setSure(true);
    if (running.value?.id === chat.id) stop();
    deleteConversation(chat.id);
  };
  const here = chat.id === currentId.value;
  return (
    <li class={here ? "here" : undefined}>
      <button type="button" class="pick" aria-current={here ? "true" : undefined} onClick={() => { currentId.value = chat.id; onPick(); }}>
        <span class="name">{nameOf(chat)}</span>
        <time>{DAY.format(chat.updated)}</time>
      </button>
      <span class="deeds">
        <button type="button" class="quiet" aria-label={`Rename: ${nameOf(chat)}`} onClick={() => setRenaming(true)}>
          Rename
        </button>
        <button type="button" class="quiet" aria-label={`${sure ? "Really delete" : "Delete"}: ${nameOf(chat)}`} onClick={remove} onBlur={() => setSure(false)}>
          {sure ? "Really delete" : "Delete"}
        </button>
      </span>
    </li>
  );
}

export function Conversations({ onPick }: { onPick: () => void }) {
  const begin = () => {
    createConversation();
    onPick();
    focusComposer();
  };
  return (
    <nav class="conversations" aria-label="Conversations">
      <button type="button" class="begin" onClick={begin}>
        New conversation
      </button>
      <ul>
        {conversations.value.map((chat) => (
          <Item key={chat.id} chat={chat} onPick={onPick} />
        ))}
      </ul>
    </nav>
  );
}
