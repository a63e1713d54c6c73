// One completion whole: its text, tokens, siblings, and how its prompt was answered at other steps.
import { useEffect, useRef } from "preact/hooks";
import { get, ofRun, type Completion, type Row, type Run, type Value } from "./api";
import { Chart } from "./chart";
import { inLine, num, signed } from "./format";
import { useKeys, usePolled } from "./hooks";
import { Failed } from "./parts";
import { color, go } from "./state";
import { Tokens } from "./tokens";
import { pieces } from "./turns";

/** Columns that have a place of their own in the detail. */
const SHOWN = new Set(["id", "prompt", "text", "reward", "rewards", "advantage", "extra_columns"]);

export function Detail({ run, split, id }: { run: Run; split: string; id: string }) {
  const loaded = usePolled(
    (signal) => get<Completion>(ofRun(run.id, "completion", id), { split }, signal),
    [run.id, split, id],
    0,
  );
  const top = useRef<HTMLElement>(null);
  useEffect(() => {
    if (top.current) top.current.scrollTop = 0;
  }, [id]);
  const group = loaded.data ? groupOf(loaded.data) : [];
  const sibling = (by: number) => {
    const at = group.findIndex((row) => String(row.id) === id);
    const next = group[at + by];
    if (next) go({ row: String(next.id) });
  };
  useKeys({ n: () => sibling(1), p: () => sibling(-1) });
  return (
    <aside class="detail" aria-label="Completion" ref={top} tabIndex={0} data-scrolls>
      <header>
        {loaded.data && <h2>{titleOf(loaded.data.row)}</h2>}
        <button class="plain" aria-label="Close (Escape)" onClick={() => go({ row: null })}>
          ✕
        </button>
      </header>
      <Failed errors={[loaded.error]} />
      {loaded.data && <Whole run={run} split={split} completion={loaded.data} />}
    </aside>
  );
}

/** A completion and its siblings by their places. */
function groupOf({ row, siblings }: Completion): Row[] {
  return [row, ...siblings].sort((a, b) => Number(a.index) - Number(b.index));
}

function titleOf(row: Row): string {
  return `Step ${inLine(row.step)}, group ${inLine(row.group_id)}, #${inLine(row.index)}`;
}

function Whole({ run, split, completion }: { run: Run; split: string; completion: Completion }) {
  const { row, tokens } = completion;
  const others = Object.entries(row).filter(([name, value]) => !SHOWN.has(name) && value !== null);
  return (
    <>
      <Scores row={row} />
      <h3>Prompt</h3>
      {/* Prompts name the marks that a completion should have, so they are shown as they are. */}
      <div class="piece text">{inLine(row.prompt)}</div>
      <h3>Completion</h3>
      <Marked text={inLine(row.text)} />
      {tokens && <Tokens tokens={tokens} />}
      {completion.siblings.length > 0 && (
        <section>
          <h3>Siblings</h3>
          <p class="note">The group of this prompt at this step; n and p go to the next and the previous one.</p>
          <div class="siblings">
            {groupOf(completion).map((other) => (
              <Answer key={other.id} row={other} title={`#${inLine(other.index)}`} open={other.id === row.id} />
            ))}
          </div>
        </section>
      )}
      <History run={run} split={split} row={row} />
      <section>
        <h3>Columns</h3>
        <dl class="columns">
          {others.map(([name, value]) => (
            <div key={name}>
              <dt>{name}</dt>
              <dd>{inLine(value)}</dd>
            </div>
          ))}
        </dl>
      </section>
    </>
  );
}

function Scores({ row }: { row: Row }) {
  const rewards = Object.entries((row.rewards ?? {}) as { [name: string]: Value });
  return (
    <p class="scores">
      <span>
        reward <b>{inLine(row.reward)}</b>
      </span>
      {rewards.map(([name, value]) => (
        <span key={name}>
          {name} <b>{inLine(value)}</b>
        </span>
      ))}
      <Advantage row={row} />
    </p>
  );
}

function Advantage({ row }: { row: Row }) {
  if (typeof row.advantage !== "number") return null;
  const sign = row.advantage > 0 ? "good" : row.advantage < 0 ? "bad" : "";
  return (
    <span class={sign}>
      advantage <b>{signed(row.advantage)}</b>
    </span>
  );
}

/** A text with its turns, thinking, tool calls and answers marked. */
function Marked({ text }: { text: string }) {
  return (
    <div class="marked">
      {pieces(text).map((piece, i) => (
        <div key={i} class={`piece ${piece.kind}`}>
          {piece.label && <h4>{piece.label}</h4>}
          {piece.text && <div class="text">{piece.text.replace(/^\n+|\n+$/g, "")}</div>}
        </div>
      ))}
    </div>
  );
}

function Answer({ row, title, open }: { row: Row; title: string; open: boolean }) {
  return (
    <article class={open ? "open" : ""} aria-current={open}>
      <header>
        <button class="plain" onClick={() => go({ row: String(row.id) })}>
          {title}
        </button>
        <span>
          reward <b>{inLine(row.reward)}</b>
        </span>
        <Advantage row={row} />
        <span>
          {inLine(row.num_tokens)} tokens, {inLine(row.finish_reason)}
        </span>
      </header>
      <div class="text">{inLine(row.text)}</div>
    </article>
  );
}

function History({ run, split, row }: { run: Run; split: string; row: Row }) {
  const prompt = inLine(row.prompt_id);
  const history = usePolled(
    (signal) => get<{ rows: Row[] }>(ofRun(run.id, "history"), { prompt, split }, signal),
    [run.id, split, prompt],
    0,
  );
  const rows = history.data?.rows ?? [];
  const steps = Map.groupBy(
    rows.filter((other) => typeof other.reward === "number"),
    (other) => other.step as number,
  );
  const rewards = [...steps.values()].map((here) => here.map((other) => other.reward as number));
  const mean = (values: number[]) => values.reduce((sum, value) => sum + value, 0) / values.length;
  const curve = {
    label: "reward",
    color: color("curve0"),
    step: [...steps.keys()],
    values: rewards.map(mean),
    low: rewards.map((values) => Math.min(...values)),
    high: rewards.map((values) => Math.max(...values)),
  };
  return (
    <section>
      <h3>The same prompt over steps</h3>
      <Failed errors={[history.error]} />
      <p class="note">
        {prompt}: {rows.length} completions at {steps.size} {steps.size === 1 ? "step" : "steps"}. The best of each step:
      </p>
      <div class="siblings">
        {[...steps].map(([step, here], i) => {
          const best = here.reduce((a, b) => ((b.reward as number) > (a.reward as number) ? b : a));
          const title = `Step ${step}: mean ${num(mean(rewards[i]))} of ${here.length}`;
          return <Answer key={step} row={best} open={best.id === row.id} title={title} />;
        })}
      </div>
      {steps.size > 1 && (
        <Chart title="Its reward: mean, least to greatest" curves={[curve]} log={false} range={null} onRange={() => {}} />
      )}
    </section>
  );
}
