// The API of the server: types, and one way to ask it.

export type Value = string | number | boolean | null | Value[] | { [key: string]: Value };
export type Row = { id: string | number; [column: string]: Value };

export interface Run {
  id: string;
  name: string;
  path: string;
  method: string | null;
  status: string;
  step: number | null;
  steps: number | null;
  started: number | null;
  updated: number | null;
  best_eval: number | null;
  seconds: number | null;
}

export interface Metrics {
  step: number[];
  columns: { [name: string]: (number | null)[] };
  last_step: number | null;
}

export interface Config {
  differences: { [key: string]: { [run: string]: Value } };
  common: { [key: string]: Value };
}

export interface Completions {
  columns: string[];
  rows: Row[];
  total: number;
}

/** Arrays over the T tokens of one completion. */
export interface Tokens {
  text: string[] | null;
  ids: number[];
  rollout_logprobs: number[] | null;
  logprobs: number[] | null;
  advantages: number[] | null;
}

export interface Completion {
  row: Row;
  /** The others of its group. */
  siblings: Row[];
  tokens: Tokens | null;
}

export interface Span {
  actor: string;
  role: string;
  phase: string;
  /** Unix seconds. */
  start: number;
  end: number;
  step: number | null;
  /** Seconds of work, where short gaps are inside. */
  busy?: number;
}

/** Whether a run goes on, so that its files may grow. */
export function isLive(run: Run): boolean {
  return run.status === "running" || run.status === "starting";
}

export interface Timeline {
  actors: string[];
  spans: Span[];
  /** Phase of the driver -> part of the steps that are shown, 0 to 1. */
  shares: { [phase: string]: number };
  /** The same for what the run waited for. */
  limits: { [name: string]: number };
  limited_by: string | null;
  /** Actor -> part of the time in which it had nothing to do. */
  idle: { [actor: string]: number };
  /** First and last step of which something is shown. */
  steps: [number, number] | null;
  start: number | null;
  end: number | null;
}

export interface Warning {
  time: number;
  step: number;
  warning: string;
  metric: string;
  value: number | null;
  threshold: number | null;
  message: string;
  look_at: string;
  /** A problem that is over has a line of its own, later. */
  event?: "begin" | "end";
}

export interface Actor {
  role: string;
  rank: number | null;
  name: string;
  pid: number | null;
  node: string | null;
  gpu: string | number | null;
  memory_gib: number | null;
  gpu_memory_gib: number | null;
  restarts: number | null;
  started: number | null;
  last_heartbeat: number | null;
  alive: boolean | null;
}

export interface Health {
  warnings: Warning[];
  actors: Actor[];
  /** Unix seconds by the server's clock. */
  now: number;
}

export interface Log {
  name: string;
  text: string;
  /** Bytes: where `text` starts, what to ask for next, and the file's size. */
  offset: number;
  next: number;
  size: number;
}

type Params = { [name: string]: string | number | boolean | null | undefined };

/** What the server answered to a question that it refused. */
export class ApiError extends Error {}

/** The server did not answer. */
export class Unreachable extends Error {}

const listeners = new Set<() => void>();
let unreachableSince: Date | null = null;

/** When the server stopped answering; null while it answers. */
export function serverGoneSince(): Date | null {
  return unreachableSince;
}

export function onServerState(listener: () => void): () => void {
  listeners.add(listener);
  return () => listeners.delete(listener);
}

function setReachable(reachable: boolean): void {
  if (reachable === (unreachableSince === null)) return;
  unreachableSince = reachable ? null : new Date();
  listeners.forEach((listener) => listener());
}

/** The path of something of a run. */
export function ofRun(run: string, ...rest: (string | number)[]): string {
  return ["/api/runs", run, ...rest].map((p, i) => (i ? encodeURIComponent(p) : p)).join("/");
}

export async function get<T>(path: string, params: Params = {}, signal?: AbortSignal): Promise<T> {
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(params)) {
    if (value !== null && value !== undefined && value !== "") query.set(name, String(value));
  }
  let response: Response;
  try {
    response = await fetch(query.size ? `${path}?${query}` : path, { signal, cache: "no-store" });
  } catch (error) {
    if (signal?.aborted) throw error;
    setReachable(false);
    throw new Unreachable("The server does not answer.");
  }
  setReachable(true);
  const body = await response.text();
  let json: unknown;
  try {
    json = JSON.parse(body);
  } catch {
    throw new ApiError(`${response.status} ${response.statusText}: ${body.slice(0, 300)}`);
  }
  if (response.ok) return json as T;
  const said = (json as { error?: unknown }).error;
  throw new ApiError(typeof said === "string" ? said : `${response.status}: ${body.slice(0, 300)}`);
}
