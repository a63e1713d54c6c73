// Curves: appended points, smoothing, and seeds joined to a mean with a band. No DOM here.
import type { Config, Metrics, Run, Value } from "./api";
import { inLine } from "./format";

export type Numbers = (number | null)[];

/** `newer` over `older`: steps that both have are taken from `newer`. */
export function merge(older: Metrics, newer: Metrics): Metrics {
  if (newer.step.length === 0) return { ...older, last_step: newer.last_step };
  let keep = older.step.length;
  while (keep > 0 && older.step[keep - 1] >= newer.step[0]) keep -= 1;
  const columns: Metrics["columns"] = {};
  for (const name of new Set([...Object.keys(older.columns), ...Object.keys(newer.columns)])) {
    const before = older.columns[name]?.slice(0, keep) ?? Array<null>(keep).fill(null);
    columns[name] = before.concat(newer.columns[name] ?? Array<null>(newer.step.length).fill(null));
  }
  const step = older.step.slice(0, keep).concat(newer.step);
  return { step, columns, last_step: newer.last_step };
}

/** The points of one metric, without the steps that lack it. */
export function points(metrics: Metrics, name: string): [number[], number[]] {
  const xs: number[] = [];
  const ys: number[] = [];
  metrics.columns[name]?.forEach((value, i) => {
    if (value === null || !Number.isFinite(value)) return;
    xs.push(metrics.step[i]);
    ys.push(value);
  });
  return [xs, ys];
}

/** Exponential moving average, without a bias to its first value (Adam's correction). */
export function smooth(values: number[], weight: number): number[] {
  if (weight <= 0) return values;
  let sum = 0;
  let norm = 0;
  return values.map((value) => {
    sum = weight * sum + (1 - weight) * value;
    norm = weight * norm + (1 - weight);
    return sum / norm;
  });
}

/** Values of (xs, ys) at each of `at`, on straight lines between points; null outside. */
function interpolate(xs: number[], ys: number[], at: number[]): Numbers {
  let i = 0;
  return at.map((x) => {
    if (xs.length === 0 || x < xs[0] || x > xs[xs.length - 1]) return null;
    while (i < xs.length - 1 && xs[i + 1] <= x) i += 1;
    if (xs[i] === x || i === xs.length - 1) return ys[i];
    return ys[i] + ((ys[i + 1] - ys[i]) * (x - xs[i])) / (xs[i + 1] - xs[i]);
  });
}

export interface Band {
  step: number[];
  mean: Numbers;
  low: Numbers;
  high: Numbers;
}

/** Mean, least and greatest of several curves at every step that one has. */
export function band(curves: [number[], number[]][]): Band {
  const step = [...new Set(curves.flatMap(([xs]) => xs))].sort((a, b) => a - b);
  const all = curves.map(([xs, ys]) => interpolate(xs, ys, step));
  const at = (i: number) => all.map((values) => values[i]).filter((v): v is number => v !== null);
  const over = (of: (values: number[]) => number) =>
    step.map((_, i) => (at(i).length ? of(at(i)) : null));
  return {
    step,
    mean: over((values) => values.reduce((a, b) => a + b, 0) / values.length),
    low: over((values) => Math.min(...values)),
    high: over((values) => Math.max(...values)),
  };
}

export interface Group {
  label: string;
  runs: Run[];
}

const OF_ONE_RUN = /(^|\.)(seed|output_dir|name|run_name|port|resume.*)$/;

/** Runs that differ only in their seed (and folder), together; the label says what else differs. */
export function groupSeeds(runs: Run[], config: Config | null): Group[] {
  const differing = Object.entries(config?.differences ?? {}).filter(([key]) => !OF_ONE_RUN.test(key));
  const groups = new Map<string, Run[]>();
  for (const run of runs) {
    const values = differing.map(([, of]) => of[run.id] ?? null);
    const key = config ? JSON.stringify([run.method, values]) : run.id;
    groups.set(key, [...(groups.get(key) ?? []), run]);
  }
  return [...groups.values()].map((members) => ({ label: labelOf(members, differing), runs: members }));
}

/** A run's own name; for several the fields in which they differ from other groups, or all names. */
function labelOf(members: Run[], differing: [string, { [run: string]: Value }][]): string {
  const values = differing.slice(0, 3).map(([key, of]) => `${key.split(".").pop()} ${inLine(of[members[0].id])}`);
  return members.length > 1 && values.length ? values.join(", ") : members.map((run) => run.name).join(", ");
}

/** The metrics that a text names: one, or with * all that fit. */
export function namesLike(text: string, names: string[]): string[] {
  if (!text.includes("*")) return names.includes(text) ? [text] : [];
  const escaped = text.split("*").map((part) => part.replace(/[.+?^${}()|[\]\\]/g, "\\$&"));
  const pattern = new RegExp(`^${escaped.join(".*")}$`);
  return names.filter((name) => pattern.test(name));
}
