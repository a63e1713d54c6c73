// What is shown (view, runs, filters) is in the hash of the address, so that it can be linked.
import { useEffect, useState } from "preact/hooks";

export const VIEWS = ["overview", "completions", "time", "health"] as const;
export type View = (typeof VIEWS)[number];

export interface Route {
  view: View;
  params: URLSearchParams;
}

/** Parameters that another view has no use for. */
const OF_VIEW: { [view in View]: string[] } = {
  overview: ["names", "smooth", "log", "seeds", "x"],
  completions: ["split", "where", "grep", "sort", "asc", "steps", "row", "color", "cols", "show"],
  time: ["from", "to"],
  health: ["log_of", "find"],
};

export function readRoute(hash: string): Route {
  const [path, query = ""] = hash.replace(/^#\/?/, "").split("?", 2);
  const view = VIEWS.find((name) => name === path) ?? "overview";
  return { view, params: new URLSearchParams(query) };
}

export function address({ view, params }: Route): string {
  const kept = new URLSearchParams(params);
  for (const name of VIEWS) {
    if (name !== view) OF_VIEW[name].forEach((param) => kept.delete(param));
  }
  return `#/${view}${kept.size ? `?${kept}` : ""}`;
}

/** Changes parameters (null removes one) and, if given, the view. */
export function go(changes: { [name: string]: string | null }, view?: View): void {
  const route = readRoute(location.hash);
  for (const [name, value] of Object.entries(changes)) {
    if (value === null || value === "") route.params.delete(name);
    else route.params.set(name, value);
  }
  const next = address({ view: view ?? route.view, params: route.params });
  if (next === location.hash) return;
  // A change of view is a step back in the browser's history; a filter is not.
  if (view && view !== route.view) history.pushState(null, "", next);
  else history.replaceState(null, "", next);
  window.dispatchEvent(new Event("hashchange"));
}

export function useRoute(): Route {
  const [route, setRoute] = useState(() => readRoute(location.hash));
  useEffect(() => {
    const update = () => setRoute(readRoute(location.hash));
    window.addEventListener("hashchange", update);
    window.addEventListener("popstate", update);
    return () => {
      window.removeEventListener("hashchange", update);
      window.removeEventListener("popstate", update);
    };
  }, []);
  return route;
}

export type Theme = "auto" | "light" | "dark";
const THEME = "rlsys-theme";

export function readTheme(): Theme {
  const stored = localStorage.getItem(THEME);
  return stored === "light" || stored === "dark" ? stored : "auto";
}

const dark = matchMedia("(prefers-color-scheme: dark)");

/** Sets the colours of the page; charts, which draw on canvases, follow "themechange". */
export function applyTheme(theme: Theme): void {
  if (theme === "auto") localStorage.removeItem(THEME);
  else localStorage.setItem(THEME, theme);
  const isDark = theme === "dark" || (theme === "auto" && dark.matches);
  document.documentElement.dataset.theme = isDark ? "dark" : "light";
  window.dispatchEvent(new Event("themechange"));
}

dark.addEventListener("change", () => applyTheme(readTheme()));

/** A number that changes with the colours of the page. */
export function useThemeCount(): number {
  const [count, setCount] = useState(0);
  useEffect(() => {
    const update = () => setCount((n) => n + 1);
    window.addEventListener("themechange", update);
    return () => window.removeEventListener("themechange", update);
  }, []);
  return count;
}

export function color(name: string): string {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}
