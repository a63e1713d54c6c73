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
  useEffect(() => {
    const controller = new AbortController();
    let timer = 0;
    let data: T | null = null;
    const ask = async () => {
      let again = everyMs;
      try {
        if (!document.hidden || data === null) data = await load(controller.signal, data);
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

export function useServerGone(): Date | null {
  const [since, setSince] = useState(serverGoneSince());
  useEffect(() => onServerState(() => setSince(serverGoneSince())), []);
  return since;
}

export type Keys = { [key: string]: (event: KeyboardEvent) => void };

/** Handles keys of the whole page while the user does not type into a field. */
export function useKeys(keys: Keys): void {
  const current = useRef(keys);
  current.current = keys;
  useEffect(() => {
    const handle = (event: KeyboardEvent) => {
      const target = event.target as HTMLElement;
      const types = target.closest("input:not([type=checkbox]):not([type=range]), textarea, select");
      if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented) return;
      if (types && event.key !== "Escape") return;
      const action = current.current[event.key];
      if (!action) return;
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
