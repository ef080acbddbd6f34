// Replies as elements. Nothing a model writes becomes markup: HTML is shown as text, images are named and never loaded.
import { lexer, type Token, type Tokens } from "marked";
import type { ComponentChildren, JSX } from "preact";
import { useMemo } from "preact/hooks";
import { CopyButton } from "./controls";

/** Where a link may lead; others are text. */
function safeTarget(href: string): URL | null {
  try {
    const url = new URL(href);
    return url.protocol === "http:" || url.protocol === "https:" ? url : null;
  } catch {
    return null;
  }
}

function Link({ token }: { token: Tokens.Link }) {
  const url = safeTarget(token.href);
  if (!url) return <>{token.raw}</>;
  const plain = token.text === token.href;
  return (
    <>
      <a href={url.href} rel="noopener noreferrer" target="_blank">
        {plain ? token.href : inline(token.tokens)}
      </a>
      {plain ? null : <span class="host"> ({url.host})</span>}
    </>
  );
}

function inline(tokens: Token[] | undefined): ComponentChildren {
  return tokens?.map((token) => {
    switch (token.type) {
      case "strong":
        return <strong>{inline(token.tokens)}</strong>;
      case "em":
        return <em>{inline(token.tokens)}</em>;
      case "del":
        return <del>{inline(token.tokens)}</del>;
      case "codespan":
        return <code>{token.text}</code>;
      case "br":
        return <br />;
      case "link":
        return <Link token={token as Tokens.Link} />;
      case "image":
        return <span class="image">{token.raw}</span>;
      case "escape":
        return token.text;
      case "text":
        return token.tokens ? inline(token.tokens) : token.text;
      case "checkbox":
        return token.checked ? "☑ " : "☐ ";
      default:
        return token.raw;
    }
  });
}

function List({ token }: { token: Tokens.List }) {
  const items = token.items.map((item) => <li>{blocks(item.tokens)}</li>);
  if (!token.ordered) return <ul>{items}</ul>;
  return <ol start={token.start === "" ? 1 : token.start}>{items}</ol>;
}

function Table({ token }: { token: Tokens.Table }) {
  const cells = (row: Tokens.TableCell[], Cell: "td" | "th") => (
    <tr>
      {row.map((cell) => (
        <Cell class={cell.align ? `to-${cell.align}` : undefined}>{inline(cell.tokens)}</Cell>
      ))}
    </tr>
  );
  return (
    <div class="wide" tabIndex={0} role="region" aria-label="Table">
      <table>
        <thead>{cells(token.header, "th")}</thead>
        <tbody>{token.rows.map((row) => cells(row, "td"))}</tbody>
      </table>
    </div>
  );
}

function Code({ token }: { token: Tokens.Code }) {
  return (
    <figure class="code">
      <figcaption>
        <span>{token.lang || "text"}</span>
        <CopyButton text={token.text} />
      </figcaption>
      <pre tabIndex={0}>
        <code>{token.text}</code>
      </pre>
    </figure>
  );
}

function blocks(tokens: Token[]): ComponentChildren {
  return tokens.map((token) => {
    switch (token.type) {
      case "space":
      case "def":
        return null;
      case "heading": {
        // Headings of a reply come below those of the page.
        const Heading = `h${Math.min(6, token.depth + 2)}` as "h3" & keyof JSX.IntrinsicElements;
        return <Heading>{inline(token.tokens)}</Heading>;
      }
      case "paragraph":
        return <p>{inline(token.tokens)}</p>;
      case "code":
        return <Code token={token as Tokens.Code} />;
      case "list":
        return <List token={token as Tokens.List} />;
      case "blockquote":
        return <blockquote>{blocks(token.tokens ?? [])}</blockquote>;
      case "table":
        return <Table token={token as Tokens.Table} />;
      case "hr":
        return <hr />;
      case "html":
        return <p class="raw">{token.raw}</p>;
      default:
        return inline([token]);
    }
  });
}

function read(text: string): ComponentChildren {
  try {
    return blocks(lexer(text));
  } catch {
    // Very deep nesting overflows the parser's stack.
    return <p class="raw">{text}</p>;
  }
}

export function Markdown({ text }: { text: string }) {
  return <>{useMemo(() => read(text), [text])}</>;
}
