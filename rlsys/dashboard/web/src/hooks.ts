// Hooks that ask the server again and again, and the keys of the page.
import { useEffect, useRef, useState } from "preact/hooks";
import { onServerState, serverGoneSince, Unreachable } from "./api";

export const POLL_MS = 2000;

export interface Loaded<T> {
  data: T | null;
  error: string | null;
}

/**
 * The newest answer of `load`, asked again every `everyMs` after the last answer came (0: once).
 * `load` gets the answer before; what was loaded for other `inputs` is forgotten.
 */
export function usePolled<T>(
  load: (signal: AbortSignal, before: T | null) => Promise<T>,
  inputs: unknown[],
  everyMs: number = POLL_MS,
): Loaded<T> {
  const [state, setState] = useState<Loaded<T> & { key: string }>({ data: null, error: null, key: "" });
  const key = JSON.stringify(inputs);
  const newest = useRef(load);
  newest.current = load;
  useEffect(() => {
    const controller = new AbortController();
    let timer = 0;
    let data: T | null = null;
    const ask = async () => {
      let again = everyMs;
      try {
        if (!document.hidden || data === null) data = await newest.current(controller.signal, data);
        if (!controller.signal.aborted) setState({ data, error: null, key });
      } catch (error) {
        if (controller.signal.aborted) return;
        // The banner of the page says that the server is gone; what was loaded stays.
        const gone = error instanceof Unreachable;
        if (gone) again = POLL_MS;
        setState({ data, error: gone ? null : (error as Error).message, key });
      }
      if (again && !controller.signal.aborted) timer = window.setTimeout(ask, again);
    };
    void ask();
    return () => {
      controller.abort();
      clearTimeout(timer);
    };
  }, [key, everyMs]);
  return state.key === key ? state : { data: null, error: null };
}

/** The newest value that is there, so that a view stays while other data for the same `key` loads. */
export function useNewest<T>(value: T | null, key: string): T | null {
  const kept = useRef<{ key: string; value: T } | null>(null);
  if (value !== null) kept.current = { key, value };
  return kept.current?.key === key ? kept.current.value : null;
}

export function useServerGone(): Date | null {
  const [since, setSince] = useState(serverGoneSince());
  useEffect(() => onServerState(() => setSince(serverGoneSince())), []);
  return since;
}

export type Keys = { [key: string]: (event: KeyboardEvent) => void };

/** Handles keys of the whole page while the user does not type into a field or scroll a text. */
export function useKeys(keys: Keys): void {
  const current = useRef(keys);
  current.current = keys;
  useEffect(() => {
    const handle = (event: KeyboardEvent) => {
      const target = event.target as HTMLElement;
      const types = target.closest("input:not([type=checkbox]):not([type=range]), textarea, select");
      const scrolls = target.closest("[data-scrolls]") && /^(Arrow|Page|Home|End)/.test(event.key);
      const action = current.current[event.key];
      if (!action || event.ctrlKey || event.metaKey || event.altKey || scrolls) return;
      if (types && event.key !== "Escape") return;
      if (types) target.blur();
      event.preventDefault();
      action(event);
    };
    window.addEventListener("keydown", handle);
    return () => window.removeEventListener("keydown", handle);
  }, []);
}

/** The width of an element in pixels, 0 before it is laid out. */
export function useWidth<E extends Element>(): [{ current: E | null }, number] {
  const ref = useRef<E>(null);
  const [width, setWidth] = useState(0);
  useEffect(() => {
    if (!ref.current) return;
    const observer = new ResizeObserver(([entry]) => setWidth(Math.floor(entry.contentRect.width)));
    observer.observe(ref.current);
    return () => observer.disconnect();
  }, []);
  return [ref, width];
}
