// Splits what a model wrote into turns, thinking, tool calls and answers, by the marks it wrote.

export interface Piece {
  kind: "text" | "think" | "tool_call" | "tool_response" | "answer" | "turn";
  /** For a turn, who speaks. */
  label: string;
  text: string;
}

const TAGS = "think|tool_call|tool_response|answer";
const MARKS = new RegExp(
  `<(/?)(${TAGS})>|<\\|im_start\\|>(\\w+)\\n?|<\\|start_header_id\\|>(\\w+)<\\|end_header_id\\|>\\n*`,
  "g",
);

/** The pieces of a text in order; together they hold all of it but the marks. */
export function pieces(text: string): Piece[] {
  const found: Piece[] = [];
  let open: Piece["kind"][] = [];
  let at = 0;
  const add = (end: number, closes = false) => {
    const kind = open.at(-1) ?? "text";
    const content = text.slice(at, end);
    const isEmptyTag = closes && found.at(-1)?.kind !== kind;
    if (content.trim() || isEmptyTag) found.push({ kind, label: kind === "text" ? "" : kind.replace("_", " "), text: content });
  };
  for (const mark of text.matchAll(MARKS)) {
    const [whole, slash, tag, ...speakers] = mark;
    // A closing mark that nothing opened: the prompt may have opened the thinking.
    if (slash && !open.includes(tag as Piece["kind"])) continue;
    add(mark.index, slash !== "" && slash !== undefined);
    at = mark.index + whole.length;
    if (slash) open = open.slice(0, open.lastIndexOf(tag as Piece["kind"]));
    else if (tag) open.push(tag as Piece["kind"]);
    else {
      open = [];
      found.push({ kind: "turn", label: speakers.find(Boolean) ?? "", text: "" });
    }
  }
  add(text.length);
  return found;
}
