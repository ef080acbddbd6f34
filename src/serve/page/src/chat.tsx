// The conversation: what was said, with figures in the margin, and the field to say more.
import { signal } from "@preact/signals";
import { useEffect, useLayoutEffect, useRef } from "preact/hooks";
import { CopyButton, Fault, Growing, large, number } from "./controls";
import { Markdown } from "./markdown";
import { planText } from "./plan";
import { current, model, modelFault, settings, storageFault, type Message } from "./store";
import { liveSpeed, regenerate, running, send, stop, takeBack } from "./talk";

const draft = signal("");

export function focusComposer() {
  document.getElementById("say")?.focus();
}

function Figures({ message }: { message: Message }) {
  const { timings, live, stopped, cut, plan } = message;
  const speed = live ? liveSpeed.value : timings?.predicted_per_second;
  return (
    <div class="figures">
      {speed ? <span>{number(speed)} tok/s</span> : null}
      {timings && <span>{timings.predicted_n} tokens</span>}
      {timings && (
        <span title="tokens of the prompt, and how many of these were in the cache">
          prompt {timings.prompt_n + timings.cached_n}, {timings.cached_n} cached
        </span>
      )}
      {plan && Object.keys(plan).length > 0 && <span class="mono">{planText(plan)}</span>}
      {stopped && <span>stopped</span>}
      {cut && <span>cut at its length</span>}
    </div>
  );
}

function Reply({ message, last }: { message: Message; last: boolean }) {
  return (
    <article class={`turn reply${last ? " last" : ""}`} aria-busy={message.live}>
      <header>
        <h2>Model</h2>
        <Figures message={message} />
      </header>
      <div class={message.live ? "prose live" : "prose"}>
        <Markdown text={message.content} />
        {message.error && <Fault text={message.error} again={last ? regenerate : undefined} />}
        {!message.live && !message.content && !message.error && <p class="muted">The reply is empty.</p>}
      </div>
      {!message.live && message.content && (
        <footer>
          <CopyButton text={message.content} />
          {last && (
            <>
              <button type="button" class="quiet" onClick={regenerate}>
                Regenerate
              </button>
              <a class="quiet" href="#attention">
                See attention
              </a>
            </>
          )}
        </footer>
      )}
    </article>
  );
}

function Said({ message, index }: { message: Message; index: number }) {
  const edit = () => {
    draft.value = takeBack(index);
    focusComposer();
  };
  return (
    <article class="turn said">
      <header>
        <h2>You</h2>
      </header>
      <div class="words">{message.content}</div>
      <footer>
        <CopyButton text={message.content} />
        <button type="button" class="quiet" disabled={running.value !== null} onClick={edit}>
          Edit
        </button>
      </footer>
    </article>
  );
}

function Empty() {
  const about = model.value;
  if (modelFault.value && !about) return <Fault text={modelFault.value} />;
  if (!about) return null;
  return (
    <div class="empty">
      <h2>{about.id}</h2>
      <p>
        {about.chat
          ? "Say something. Replies are written here, on this machine."
          : "This model has no chat template: what you write is gone on with as it is."}
      </p>
      <dl>
        <div>
          <dt>kind</dt>
          <dd>{about.kind}</dd>
        </div>
        <div>
          <dt>parameters</dt>
          <dd>{large(about.n_params)}</dd>
        </div>
        <div>
          <dt>layers × heads</dt>
          <dd>
            {about.n_layers} × {about.n_heads}
          </dd>
        </div>
        <div>
          <dt>context</dt>
          <dd>{about.n_ctx.toLocaleString("en")} tokens</dd>
        </div>
        <div>
          <dt>attention</dt>
          <dd>{planText({ ...about.plan, ...settings.value.plan })}</dd>
        </div>
      </dl>
    </div>
  );
}

/** Follows what is written, unless the reader has scrolled up. */
function useFollowing(mark: unknown) {
  const box = useRef<HTMLDivElement>(null);
  const follows = useRef(true);
  const watch = (event: Event) => {
    const { scrollHeight, scrollTop, clientHeight } = event.target as HTMLElement;
    follows.current = scrollHeight - scrollTop - clientHeight < 80;
  };
  useLayoutEffect(() => {
    if (follows.current) box.current!.scrollTop = box.current!.scrollHeight;
  }, [mark]);
  const restart = () => (follows.current = true);
  return { box, watch, restart };
}

function Composer({ onSent }: { onSent: () => void }) {
  const busy = running.value !== null;
  const say = () => {
    if (busy || !draft.value.trim() || !model.value) return;
    onSent();
    send(draft.value);
    draft.value = "";
  };
  return (
    <form
      class="composer"
      onSubmit={(event) => {
        event.preventDefault();
        say();
      }}
    >
      <div class="box">
        <Growing id="say" label="Message" value={draft.value} placeholder="Write a message" onText={(text) => (draft.value = text)} onSend={say} />
        {busy ? (
          <button type="button" class="main" onClick={() => { stop(); focusComposer(); }}>
            Stop
          </button>
        ) : (
          <button type="submit" class="main" disabled={!draft.value.trim() || !model.value}>
            Send
          </button>
        )}
      </div>
      <p class="hint">
        <kbd>Enter</kbd> sends, <kbd>Shift Enter</kbd> starts a line, <kbd>Esc</kbd> stops
      </p>
    </form>
  );
}

export function Chat() {
  const messages = current.value?.messages ?? [];
  const { box, watch, restart } = useFollowing(messages);
  useEffect(() => {
    restart();
    if (matchMedia("(hover: hover)").matches) focusComposer();
  }, [current.value?.id]);
  return (
    <section class="chat" aria-label="Chat">
      <div class="transcript" ref={box} onScroll={watch} role="log" aria-live="off" aria-label="Conversation" tabIndex={0}>
        {messages.length === 0 && <Empty />}
        {messages.map((message, index) =>
          message.role === "user" ? (
            <Said key={index} message={message} index={index} />
          ) : (
            <Reply key={index} message={message} last={index === messages.length - 1} />
          ),
        )}
        {storageFault.value && <Fault text={storageFault.value} />}
      </div>
      <Composer onSent={restart} />
    </section>
  );
}
