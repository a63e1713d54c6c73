// The page: its header, the choice of runs, and one of four views.
import "uplot/dist/uPlot.min.css";
import "./style.css";
import { render } from "preact";
import { useEffect, useState } from "preact/hooks";
import { get, type Run } from "./api";
import { Completions } from "./completions";
import { clock, duration, num } from "./format";
import { Health } from "./health";
import { useKeys, usePolled, useServerGone } from "./hooks";
import { Overview } from "./overview";
import { Failed } from "./parts";
import { address, applyTheme, go, readTheme, useRoute, VIEWS, type Theme, type View } from "./state";
import { Time } from "./time";

const TITLES: { [view in View]: string } = {
  overview: "Overview",
  completions: "Completions",
  time: "Time",
  health: "Health",
};
const THEMES: Theme[] = ["auto", "light", "dark"];
/** Runs that the overview shows when the address names none. */
const AT_FIRST = 12;

function App() {
  const { view, params } = useRoute();
  const [theme, setTheme] = useState(readTheme());
  const [help, setHelp] = useState(false);
  const listed = usePolled((signal) => get<Run[]>("/api/runs", {}, signal), []);
  const runs = listed.data ?? [];
  const ids = params.get("runs")?.split(",");
  const overlaid = ids ? runs.filter((run) => ids.includes(run.id)) : runs.slice(0, AT_FIRST);
  const run = runs.find((other) => other.id === params.get("run")) ?? overlaid[0] ?? runs[0];
  const nextTheme = () => setTheme(THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length]);
  useEffect(() => applyTheme(theme), [theme]);
  useEffect(() => {
    document.title = run ? `${run.name} · ${TITLES[view]} · rlsys` : "rlsys";
  }, [run?.name, view]);
  useKeys({
    ...Object.fromEntries(VIEWS.map((name, i) => [String(i + 1), () => go({}, name)])),
    t: nextTheme,
    "?": () => setHelp(!help),
    Escape: () => setHelp(false),
  });
  return (
    <>
      <header class="top">
        <a class="brand" href="#/overview">
          rlsys
        </a>
        <nav aria-label="Views">
          {VIEWS.map((name, i) => (
            <a
              key={name} href={address({ view: name, params })} title={`${TITLES[name]} (${i + 1})`}
              aria-current={name === view ? "page" : undefined}
            >
              {TITLES[name]}
            </a>
          ))}
        </nav>
        <span class="right">
          <button class="plain" onClick={nextTheme} title="Colours (t)">
            {theme}
          </button>
          <button class="plain" onClick={() => setHelp(!help)} title="Keys (?)" aria-expanded={help}>
            Keys
          </button>
        </span>
      </header>
      <Gone />
      {help && <Help view={view} close={() => setHelp(false)} />}
      <main>
        <Failed errors={[listed.error]} />
        {!listed.data && !listed.error && <p class="empty">Reading the runs…</p>}
        {listed.data && !runs.length && <p class="empty">No run here yet.</p>}
        {run && <Runs runs={runs} chosen={view === "overview" ? overlaid : [run]} overview={view === "overview"} />}
        {run && view === "overview" && <Overview runs={overlaid} />}
        {run && view === "completions" && <Completions runs={runs} run={run} />}
        {run && view === "time" && <Time runs={runs} run={run} />}
        {run && view === "health" && <Health runs={runs} run={run} />}
      </main>
    </>
  );
}

function Gone() {
  const since = useServerGone();
  if (!since) return null;
  return (
    <div class="gone" role="alert">
      The server has not answered since {clock(since.getTime() / 1000)}. The page asks again every 2 seconds; what it
      shows is from before.
    </div>
  );
}

interface RunsProps {
  runs: Run[];
  chosen: Run[];
  overview: boolean;
}

/** What each run is doing; in the overview with a box to lay its curves over the others. */
function Runs({ runs, chosen, overview }: RunsProps) {
  const [find, setFind] = useState("");
  const toggle = (run: Run) => {
    const next = runs.filter((other) => (other === run ? !chosen.includes(other) : chosen.includes(other)));
    if (next.length) go({ runs: next.map((other) => other.id).join(",") });
  };
  const shown = overview ? runs.filter((run) => run.name.toLowerCase().includes(find.toLowerCase())) : chosen;
  return (
    <>
      {overview && runs.length > 8 && (
        <div class="bar">
          <label>
            Runs <input type="search" value={find} placeholder="name" onInput={(e) => setFind(e.currentTarget.value)} />
          </label>
          <span class="note">
            {chosen.length} of {runs.length} shown
          </span>
        </div>
      )}
      <ul class="runs">
        {shown.map((run) => (
          <li key={run.id} title={run.path}>
            {overview && runs.length > 1 ? (
              <label>
                <input type="checkbox" checked={chosen.includes(run)} onChange={() => toggle(run)} /> <b>{run.name}</b>
              </label>
            ) : (
              <b>{run.name}</b>
            )}
            <span class={`status ${run.status}`}>{run.status}</span>
            <span>
              step {num(run.step)}
              {run.steps !== null && ` of ${num(run.steps)}`}
            </span>
            {run.best_eval !== null && <span>best held-out {num(run.best_eval)}</span>}
            {run.seconds !== null && <span>{duration(Math.round(run.seconds))}</span>}
          </li>
        ))}
      </ul>
    </>
  );
}

const KEYS: { [view in View | "all"]: [string, string][] } = {
  all: [
    ["1 2 3 4", "overview, completions, time, health"],
    ["t", "colours of the system, light, dark"],
    ["?", "these keys"],
  ],
  overview: [
    ["[ ]", "less or more smoothing"],
    ["l", "log scale"],
    ["/", "add a metric by its name"],
    ["← → + −", "in a chart that has the focus: cursor and zoom; drag does the same"],
    ["0", "all steps"],
  ],
  completions: [
    ["/", "the condition"],
    ["j k ↑ ↓", "next and previous row"],
    ["Enter", "show the row"],
    ["n p", "next and previous sibling"],
    ["r", "read new rows"],
    ["Esc", "close"],
  ],
  time: [
    ["← →", "earlier, later"],
    ["+ −", "closer, farther"],
    ["a", "the whole run"],
    ["0", "the newest steps, live"],
  ],
  health: [],
};

function Help({ view, close }: { view: View; close: () => void }) {
  return (
    <section class="help" aria-label="Keys">
      <dl>
        {[...KEYS[view], ...KEYS.all].map(([key, text]) => (
          <div key={key}>
            <dt>{key}</dt>
            <dd>{text}</dd>
          </div>
        ))}
      </dl>
      <button onClick={close}>Close</button>
    </section>
  );
}

applyTheme(readTheme());
render(<App />, document.querySelector("#app") as HTMLElement);
