// Whether the run is well: warnings, actors, and their logs.
import { get, isLive, ofRun, type Actor, type Health as Answer, type Run, type Warning } from "./api";
import { clock, duration, inLine, num } from "./format";
import { usePolled } from "./hooks";
import { Logs } from "./logs";
import { Failed, RunChoice } from "./parts";
import { go } from "./state";

export function Health({ runs, run }: { runs: Run[]; run: Run }) {
  const health = usePolled((signal) => get<Answer>(ofRun(run.id, "health"), {}, signal), [run.id]);
  return (
    <>
      {runs.length > 1 && (
        <div class="bar">
          <RunChoice runs={runs} run={run} />
        </div>
      )}
      <Failed errors={[health.error]} />
      {health.data && <Warnings warnings={health.data.warnings} />}
      {health.data && <Actors actors={health.data.actors} now={health.data.now} running={isLive(run)} />}
      <Logs run={run} />
    </>
  );
}

/** Each problem, the newest first, with the step at which it was over. */
function problems(warnings: Warning[]): [Warning, number | null][] {
  const found: [Warning, number | null][] = [];
  for (const warning of warnings) {
    const begun = found.findLast(([other, over]) => other.warning === warning.warning && over === null);
    if (warning.event !== "end") found.push([warning, null]);
    else if (begun) begun[1] = warning.step;
  }
  return found.reverse();
}

function Warnings({ warnings }: { warnings: Warning[] }) {
  return (
    <section class="panel">
      <h2>Warnings</h2>
      {!warnings.length && <p class="empty">No warnings.</p>}
      <ul class="warnings">
        {problems(warnings).map(([warning, over], i) => (
          <li key={i} class={over === null ? "" : "over"}>
            <header>
              <b>{warning.warning.replaceAll("_", " ")}</b>
              <span>
                step {num(warning.step)}
                {over !== null && `, over at step ${num(over)}`}
              </span>
              <time>{clock(warning.time)}</time>
            </header>
            <p>{warning.message}</p>
            <p class="note">
              <button class="plain link" onClick={() => go({ names: warning.metric, run: null }, "overview")}>
                {warning.metric}
              </button>{" "}
              {num(warning.value)}
              {warning.threshold !== null && `, threshold ${num(warning.threshold)}`}
              {warning.look_at && <> · look at {warning.look_at}</>}
            </p>
          </li>
        ))}
      </ul>
    </section>
  );
}

type Column = [title: string, text: (actor: Actor, now: number) => string];
const COLUMNS: Column[] = [
  ["Role", (a) => (a.rank === null || a.rank === undefined ? a.role : `${a.role} ${a.rank}`)],
  ["Name", (a) => a.name],
  ["Node", (a) => inLine(a.node)],
  ["Process", (a) => (a.pid === null ? "–" : String(a.pid))],
  ["Device", (a) => (a.gpu === null || a.gpu === undefined ? "CPU" : `GPU ${inLine(a.gpu)}`)],
  ["Memory", (a) => gib(a.memory_gib)],
  ["GPU memory", (a) => gib(a.gpu_memory_gib)],
  ["Restarts", (a) => inLine(a.restarts)],
  ["Up since", (a) => (a.started ? clock(a.started) : "–")],
  ["Heartbeat", (a, now) => (a.last_heartbeat ? `${duration(Math.max(0, Math.round(now - a.last_heartbeat)))} ago` : "–")],
];

function gib(value: number | null | undefined): string {
  return value === null || value === undefined ? "–" : `${num(value)} GiB`;
}

function Actors({ actors, now, running }: { actors: Actor[]; now: number; running: boolean }) {
  return (
    <section class="panel">
      <h2>Actors</h2>
      {!actors.length && <p class="empty">This run recorded no actors.</p>}
      {actors.length > 0 && (
        <table class="cards">
          <thead>
            <tr>
              {COLUMNS.map(([title]) => (
                <th scope="col" key={title}>
                  {title}
                </th>
              ))}
              <th scope="col">State</th>
            </tr>
          </thead>
          <tbody>
            {actors.map((actor) => (
              <tr key={actor.name}>
                {COLUMNS.map(([title, text]) => (
                  <td key={title} data-title={title}>
                    {text(actor, now)}
                  </td>
                ))}
                <td data-title="State">
                  {!running ? "ended" : actor.alive ? <span class="good">alive</span> : <span class="bad">dead</span>}
                </td>
              </tr>
            ))}
          </tbody>
        </table>
      )}
    </section>
  );
}
