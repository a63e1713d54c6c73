// The curves of one or several runs, and how their configs differ.
import { useMemo, useState } from "preact/hooks";
import { get, isLive, ofRun, type Config, type Metrics, type Run } from "./api";
import { Chart, type Curve } from "./chart";
import { Failed } from "./parts";
import { inLine } from "./format";
import { useKeys, useNewest, usePolled } from "./hooks";
import { band, groupSeeds, merge, namesLike, points, smooth, type Group } from "./series";
import { go, useRoute, useThemeCount, color } from "./state";

const POINTS = 2000;
/** What a panel of the overview shows: the first of its names that the runs have. */
const PANELS: string[][] = [
  ["reward", "loss"],
  ["eval/reward", "eval/loss", "eval/rewards/*/mean"],
  ["completions/mean_length", "num_loss_tokens"],
  ["kl"],
  ["sampling/logp_difference/mean"],
  ["entropy", "mean_token_accuracy"],
  ["time/step"],
  ["rollout/tokens_per_second", "update/tokens_per_second", "tokens_per_second"],
];
export const CURVES = 8;
const MAX_EXTRA = 24;

type ByRun = { [run: string]: Metrics };

async function loadMetrics(
  runs: Run[],
  names: string[],
  range: [number, number] | null,
  signal: AbortSignal,
  before: ByRun | null,
): Promise<ByRun> {
  const ask = async (run: Run): Promise<[string, Metrics]> => {
    const known = before?.[run.id];
    if (known && !isLive(run) && known.last_step === run.step) return [run.id, known];
    const path = ofRun(run.id, "metrics");
    const common = { names: names.join(","), points: POINTS };
    // Two steps back, because an evaluation is written after the step that it belongs to.
    if (known && known.last_step !== null && known.step.length < 2 * POINTS) {
      if (range && known.last_step > range[1]) return [run.id, known];
      const newer = await get<Metrics>(path, { ...common, after: known.last_step - 2 }, signal);
      if ((newer.last_step ?? -1) >= known.last_step) return [run.id, merge(known, newer)];
    }
    const [after, last] = range ? [range[0] - 1, range[1]] : [null, null];
    return [run.id, await get<Metrics>(path, { ...common, after, before: last }, signal)];
  };
  return Object.fromEntries(await Promise.all(runs.map(ask)));
}

function curvesOf(name: string, groups: Group[], data: ByRun, weight: number): Curve[] {
  const curves: Curve[] = [];
  groups.forEach((group, i) => {
    const stroke = color(`curve${i % CURVES}`);
    const all = group.runs
      .filter((run) => data[run.id])
      .map((run) => points(data[run.id], name))
      .filter(([xs]) => xs.length);
    if (!all.length) return;
    // Evaluations are few and far between: what came before says little about them.
    const by = name.startsWith("eval/") ? 0 : weight;
    const smoothed = all.map(([xs, ys]): [number[], number[]] => [xs, smooth(ys, by)]);
    if (all.length > 1) {
      const { step, mean, low, high } = band(smoothed);
      curves.push({ label: group.label, color: stroke, step, values: mean, low, high });
      return;
    }
    const [step, values] = all[0];
    if (by > 0) curves.push({ label: group.label, color: stroke, step, values, faint: true });
    curves.push({ label: group.label, color: stroke, step, values: smoothed[0][1] });
  });
  return curves;
}

export function Overview({ runs }: { runs: Run[] }) {
  const { params } = useRoute();
  const weight = Number(params.get("smooth") ?? 0);
  const log = params.get("log") === "1";
  const seeds = params.get("seeds") !== "0";
  const range = (params.get("x")?.split(":").map(Number) ?? null) as [number, number] | null;
  const extra = params.get("names")?.split(",").filter(Boolean) ?? [];
  const ids = runs.map((run) => run.id);

  const config = usePolled((signal) => get<Config>("/api/config", { runs: ids.join(",") }, signal), [ids], 30_000);
  const names = usePolled(
    async (signal) => {
      const lists = await Promise.all(
        ids.map((id) => get<string[]>(ofRun(id, "metric_names"), {}, signal)),
      );
      return [...new Set(lists.flat())].sort();
    },
    [ids],
    10_000,
  );
  const has = names.data ?? [];
  const panels = PANELS.flatMap((choice) => {
    const found = choice.map((text) => namesLike(text, has)).find((fits) => fits.length);
    return found?.slice(0, 1) ?? [];
  });
  const added = extra.flatMap((text) => namesLike(text, has).map((name) => ({ text, name })));
  const shown = added.filter(({ name }) => !panels.includes(name)).slice(0, MAX_EXTRA);
  const asked = [...panels, ...shown.map(({ name }) => name)];
  const metrics = usePolled(
    async (signal, before: ByRun | null) =>
      asked.length ? loadMetrics(runs, asked, range, signal, before) : {},
    [ids, asked, range],
    asked.length ? undefined : 0,
  );
  const data = useNewest(metrics.data, ids.join());
  const groups = useMemo(
    () =>
      seeds && config.data
        ? groupSeeds(runs, config.data)
        : runs.map((run) => ({ label: run.name, runs: [run] })),
    [ids.join(), seeds, config.data],
  );
  const theme = useThemeCount();
  const curves = useMemo(
    () => asked.map((name) => curvesOf(name, groups, data ?? {}, weight)),
    [data, groups, weight, theme, asked.join()],
  );
  const setSmooth = (value: number) =>
    go({ smooth: value > 0 ? String(Math.min(0.99, Math.round(value * 100) / 100)) : null });
  const setRange = (to: [number, number] | null) => go({ x: to ? to.join(":") : null });
  useKeys({
    l: () => go({ log: log ? null : "1" }),
    "]": () => setSmooth(Math.min(weight + 0.1, 0.95)),
    "[": () => setSmooth(weight - 0.1),
    "0": () => setRange(null),
    "/": () => document.querySelector<HTMLInputElement>("#add-metric")?.focus(),
  });
  return (
    <>
      <div class="bar">
        <label>
          Smoothing{" "}
          <input
            type="range" min="0" max="0.99" step="0.01" value={weight}
            onInput={(event) => setSmooth(Number(event.currentTarget.value))}
          />{" "}
          <output>{weight.toFixed(2)}</output>
        </label>
        <label>
          <input type="checkbox" checked={log} onChange={() => go({ log: log ? null : "1" })} /> Log scale
        </label>
        <label>
          <input type="checkbox" checked={seeds} onChange={() => go({ seeds: seeds ? "0" : null })} /> Seeds
          as mean and range
        </label>
        <AddMetric names={has} extra={extra} />
        {range && (
          <button onClick={() => setRange(null)}>
            Steps {range[0]} to {range[1]}: show all
          </button>
        )}
      </div>
      <Failed errors={[names.error, metrics.error, config.error]} />
      <Legend groups={groups} />
      {names.data && !asked.length && <p class="empty">No metrics yet: the first step has not ended.</p>}
      <div class="charts">
        {asked.map((name, i) => (
          <Chart
            key={name} title={name} curves={curves[i] ?? []} log={log} range={range} onRange={setRange}
            onRemove={
              i < panels.length
                ? undefined
                : () => go({ names: extra.filter((t) => t !== shown[i - panels.length].text).join(",") })
            }
          />
        ))}
      </div>
      <ConfigTable runs={runs} config={config.data} />
    </>
  );
}

function AddMetric({ names, extra }: { names: string[]; extra: string[] }) {
  const [text, setText] = useState("");
  const [problem, setProblem] = useState("");
  const add = (event: Event) => {
    event.preventDefault();
    if (!text) return;
    if (!namesLike(text, names).length) {
      setProblem(`No metric is called ${text}.`);
      return;
    }
    setProblem("");
    setText("");
    go({ names: [...new Set([...extra, text])].join(",") });
  };
  return (
    <form onSubmit={add}>
      <label>
        Add{" "}
        <input
          id="add-metric" list="metric-names" placeholder="metric, or rewards/*/mean" value={text}
          onInput={(event) => setText(event.currentTarget.value)}
        />
      </label>
      <datalist id="metric-names">
        {names.map((name) => (
          <option key={name} value={name} />
        ))}
      </datalist>
      <button>Add</button> {problem && <span class="error">{problem}</span>}
    </form>
  );
}

function Legend({ groups }: { groups: Group[] }) {
  return (
    <ul class="legend">
      {groups.map((group, i) => (
        <li key={group.runs[0].id}>
          <i class={`swatch curve${i % CURVES}`} />
          {group.label}
          {group.runs.length > 1 && (
            <small title={group.runs.map((run) => run.name).join(", ")}>
              {" "}
              mean of {group.runs.length}, least to greatest
            </small>
          )}
        </li>
      ))}
    </ul>
  );
}

function ConfigTable({ runs, config }: { runs: Run[]; config: Config | null }) {
  if (!config) return null;
  const differences = Object.entries(config.differences);
  return (
    <section class="panel">
      <h2>Config</h2>
      {runs.length > 1 && !differences.length && <p>The configs do not differ.</p>}
      {differences.length > 0 && (
        <div class="scroll">
          <table>
            <thead>
              <tr>
                <th scope="col">Differs</th>
                {runs.map((run) => (
                  <th scope="col" key={run.id}>
                    {run.name}
                  </th>
                ))}
              </tr>
            </thead>
            <tbody>
              {differences.map(([key, values]) => (
                <tr key={key}>
                  <th scope="row">{key}</th>
                  {runs.map((run) => (
                    <td key={run.id}>{inLine(values[run.id])}</td>
                  ))}
                </tr>
              ))}
            </tbody>
          </table>
        </div>
      )}
      <details>
        <summary>{runs.length > 1 ? "What they have in common" : "All fields"}</summary>
        <div class="scroll">
          <table>
            <tbody>
              {flat(config.common).map(([key, value]) => (
                <tr key={key}>
                  <th scope="row">{key}</th>
                  <td>{value}</td>
                </tr>
              ))}
            </tbody>
          </table>
        </div>
      </details>
    </section>
  );
}

function flat(config: Config["common"], prefix = ""): [string, string][] {
  return Object.entries(config ?? {}).flatMap(([key, value]): [string, string][] =>
    value && typeof value === "object" && !Array.isArray(value)
      ? flat(value, `${prefix}${key}.`)
      : [[prefix + key, typeof value === "number" ? String(value) : inLine(value)]],
  );
}
