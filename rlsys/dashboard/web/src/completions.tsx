// The completions of a run: filters, a table of any length, and one of them whole.
import { useEffect, useRef, useState } from "preact/hooks";
import { get, isLive, ofRun, type Completions as Answer, type Row, type Run } from "./api";
import { Detail } from "./detail";
import { inLine, num, signed } from "./format";
import { useKeys, usePolled } from "./hooks";
import { Failed, RunChoice } from "./parts";
import { go, useRoute } from "./state";
import { useVirtualRows } from "./virtual";

const PAGE = 100;
const HEIGHT = 30;
/** Rows that the table can scroll to: browsers cannot lay out a much higher element. */
const MAX_ROWS = 500_000;
const POLL_MS = 5000;
const DEFAULT = ["step", "group_id", "index", "reward", "advantage", "num_tokens", "finish_reason", "prompt", "text"];
/** On a screen as narrow as a phone. */
const NARROW = ["step", "reward", "text"];
const WIDE = new Set(["prompt", "text"]);

interface Asked {
  run: string;
  split: string;
  where: string;
  grep: string;
  from_step: string;
  to_step: string;
  sort: string;
  descending: boolean;
}

function asked(run: Run, params: URLSearchParams): Asked {
  const [from = "", to = from] = params.get("steps")?.split(":") ?? [];
  return {
    run: run.id,
    split: params.get("split") ?? "train",
    where: params.get("where") ?? "",
    grep: params.get("grep") ?? "",
    from_step: from,
    to_step: to,
    sort: params.get("sort") ?? "",
    descending: params.get("asc") !== "1",
  };
}

function shownColumns(params: URLSearchParams): string[] {
  return params.get("cols")?.split(",") ?? (matchMedia("(max-width: 760px)").matches ? NARROW : DEFAULT);
}

function ask({ run, ...query }: Asked, offset: number, limit: number, signal?: AbortSignal) {
  return get<Answer>(ofRun(run, "completions"), { ...query, offset, limit }, signal);
}

export function Completions({ runs, run }: { runs: Run[]; run: Run }) {
  const { params } = useRoute();
  const query = asked(run, params);
  const [generation, setGeneration] = useState(0);
  const first = usePolled(
    (signal) => ask(query, 0, PAGE, signal),
    [query, generation],
    isLive(run) ? POLL_MS : 0,
  );
  // A failed question leaves the form and says why; the table of the question before is gone.
  return (
    <>
      <Filters
        runs={runs} run={run} query={query} columns={first.data?.columns ?? DEFAULT}
        again={() => setGeneration((n) => n + 1)}
      />
      <Failed errors={[first.error]} />
      {first.data && (
        <Table
          key={JSON.stringify([query, generation])}
          query={query} first={first.data} reload={() => setGeneration((n) => n + 1)} run={run}
        />
      )}
      {!first.data && !first.error && <p class="empty">Reading…</p>}
    </>
  );
}

interface FiltersProps {
  runs: Run[];
  run: Run;
  query: Asked;
  columns: string[];
  /** Asks the same question again. */
  again: () => void;
}

function Filters({ runs, run, query, columns, again }: FiltersProps) {
  const { params } = useRoute();
  const submit = (event: SubmitEvent) => {
    event.preventDefault();
    const form = new FormData(event.currentTarget as HTMLFormElement);
    const text = (name: string) => (form.get(name) as string).trim() || null;
    go({ where: text("where"), grep: text("grep"), steps: text("steps"), row: null });
    again();
  };
  useKeys({ "/": () => document.querySelector<HTMLInputElement>("#where")?.focus() });
  const shown = shownColumns(params);
  const toggle = (name: string) => {
    const next = columns.filter((c) => (c === name ? !shown.includes(c) : shown.includes(c)));
    go({ cols: next.join(",") });
  };
  return (
    <form class="bar" onSubmit={submit} key={JSON.stringify([query.where, query.grep, params.get("steps")])}>
      <RunChoice runs={runs} run={run} />
      <label class="grow">
        Where{" "}
        <input
          id="where" name="where" class="mono" defaultValue={query.where}
          placeholder="reward < 1 and num_tokens > 50" spellcheck={false} autocomplete="off"
        />
      </label>
      <label>
        Text{" "}
        <input id="grep" name="grep" type="search" defaultValue={query.grep} placeholder="contains" autocomplete="off" />
      </label>
      <label>
        Steps{" "}
        <input name="steps" size={7} defaultValue={params.get("steps") ?? ""} placeholder="10:20" autocomplete="off" />
      </label>
      <label>
        Of{" "}
        <select value={query.split} onChange={(e) => go({ split: e.currentTarget.value, row: null })}>
          <option value="train">training</option>
          <option value="eval">evaluation</option>
          <option value="filtered">filtered groups</option>
        </select>
      </label>
      <button>Filter</button>
      <details class="menu">
        <summary>Columns</summary>
        <div>
          {columns.map((name) => (
            <label key={name}>
              <input type="checkbox" checked={shown.includes(name)} onChange={() => toggle(name)} /> {name}
            </label>
          ))}
        </div>
      </details>
    </form>
  );
}

interface TableProps {
  query: Asked;
  first: Answer;
  reload: () => void;
  run: Run;
}

/** The pages of the table that were read, by number; the first is polled. */
function usePages(query: Asked, first: Answer, needed: number[]) {
  const [read, setRead] = useState<{ total: number; pages: { [page: number]: Row[] } }>({ total: 0, pages: {} });
  // New rows move the others to other places, and so to other pages.
  const { total } = first;
  const pages = read.total === total ? read.pages : {};
  const [error, setError] = useState<string | null>(null);
  const inFlight = useRef(new Set<number>());
  useEffect(() => {
    for (const page of needed) {
      if (page === 0 || pages[page] || inFlight.current.has(page)) continue;
      inFlight.current.add(page);
      ask(query, page * PAGE, PAGE)
        .then(({ rows }) =>
          setRead((known) => ({ total, pages: { ...(known.total === total && known.pages), [page]: rows } })),
        )
        .catch((problem: Error) => setError(problem.message))
        .finally(() => inFlight.current.delete(page));
    }
  }, [needed.join(), total]);
  const at = (i: number): Row | undefined => {
    const page = Math.floor(i / PAGE);
    return (page === 0 ? first.rows : pages[page])?.[i - page * PAGE];
  };
  return { at, error };
}

function Table({ query, first: newest, reload, run }: TableProps) {
  const { params } = useRoute();
  const scroller = useRef<HTMLDivElement>(null);
  // While a person reads further down, rows keep their places; at the top, new ones come in.
  const kept = useRef(newest);
  const atTop = (scroller.current?.scrollTop ?? 0) < HEIGHT && !params.get("row");
  if (atTop || newest.total === kept.current.total) kept.current = newest;
  const first = kept.current;
  const count = Math.min(first.total, MAX_ROWS);
  const rows = useVirtualRows(scroller, count, HEIGHT);
  const items = rows.getVirtualItems();
  const needed = [...new Set(items.map((item) => Math.floor(item.index / PAGE)))];
  const { at, error } = usePages(query, first, needed);
  const columns = shownColumns(params).filter((name) => first.columns.includes(name));
  const open = params.get("row");
  const [cursor, setCursor] = useState(-1);
  const move = (by: number) => {
    const next = Math.min(Math.max(cursor + by, 0), count - 1);
    setCursor(next);
    rows.scrollToIndex(next);
    const row = at(next);
    if (open && row) go({ row: String(row.id) });
  };
  const show = (i: number) => {
    const row = at(i);
    setCursor(i);
    if (row) go({ row: String(row.id) });
  };
  useKeys({
    j: () => move(1),
    ArrowDown: () => move(1),
    k: () => move(-1),
    ArrowUp: () => move(-1),
    PageDown: () => move(15),
    PageUp: () => move(-15),
    Home: () => move(-count),
    Enter: () => cursor >= 0 && show(cursor),
    Escape: () => go({ row: null }),
    r: reload,
  });
  const narrow = (name: string) => Math.max(3.5, name.length * 0.56 + 1);
  const layout = columns.map((name) => (WIDE.has(name) ? "minmax(11rem, 5fr)" : `minmax(${narrow(name)}rem, 1fr)`)).join(" ");
  const least = columns.reduce((sum, name) => sum + (WIDE.has(name) ? 11 : narrow(name)) + 0.7, 1.4);
  return (
    <>
      <p class="note" aria-live="polite">
        {first.total.toLocaleString("en-US")} completions
        {newest.total > first.total && (
          <button onClick={reload}>{(newest.total - first.total).toLocaleString("en-US")} newer (r)</button>
        )}
        {first.total > count && `; the table reaches the first ${count.toLocaleString("en-US")}: filter to see others`}
      </p>
      <Failed errors={[error]} />
      <div class={`split${open ? " open" : ""}`}>
        <div class="table" role="grid" aria-rowcount={first.total} aria-label="Completions" ref={scroller} tabIndex={0}>
          <div class="head" role="row" style={{ gridTemplateColumns: layout, minWidth: `${least}rem` }}>
            {columns.map((name) => (
              <Heading key={name} name={name} query={query} />
            ))}
          </div>
          <div class="rows" style={{ height: `${rows.getTotalSize()}px`, minWidth: `${least}rem` }}>
            {items.map((item) => {
              const row = at(item.index);
              const isOpen = row !== undefined && String(row.id) === open;
              return (
                <div
                  key={item.key} role="row" aria-rowindex={item.index + 1} aria-selected={isOpen}
                  class={`row${isOpen ? " open" : ""}${item.index === cursor ? " cursor" : ""}`}
                  style={{ transform: `translateY(${item.start}px)`, gridTemplateColumns: layout }}
                  onClick={() => show(item.index)}
                >
                  {columns.map((name) => (
                    <Cell key={name} name={name} row={row} />
                  ))}
                </div>
              );
            })}
          </div>
          {count === 0 && <p class="empty">No completion fits.</p>}
        </div>
        {open && <Detail key={run.id + query.split} run={run} split={query.split} id={open} />}
      </div>
    </>
  );
}

function Heading({ name, query }: { name: string; query: Asked }) {
  const sorted = query.sort === name;
  const order = !sorted ? "none" : query.descending ? "descending" : "ascending";
  return (
    <div role="columnheader" aria-sort={order} class={`c-${name}`}>
      <button
        class="plain" title={`Sort by ${name}`}
        onClick={() => go({ sort: name, asc: sorted && query.descending ? "1" : null })}
      >
        {name}
        {sorted && (query.descending ? " ▾" : " ▴")}
      </button>
    </div>
  );
}

function Cell({ name, row }: { name: string; row: Row | undefined }) {
  const value = row?.[name];
  let text = row ? inLine(value) : "…";
  if (name === "advantage" && typeof value === "number") text = signed(value);
  if (name === "step" && typeof value === "number") text = num(value);
  const sign = name === "advantage" && typeof value === "number" ? (value > 0 ? " good" : value < 0 ? " bad" : "") : "";
  return (
    <div role="gridcell" class={`c-${name}${typeof value === "number" ? " number" : ""}${sign}`}>
      {text.length > 300 ? text.slice(0, 300) : text}
    </div>
  );
}
