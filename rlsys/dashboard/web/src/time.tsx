// Where the time goes: every actor on one clock, and the share of each phase.
import { useEffect, useRef, useState } from "preact/hooks";
import { get, isLive, ofRun, type Run, type Span, type Timeline } from "./api";
import { clock, duration, percent } from "./format";
import { POLL_MS, useKeys, useNewest, usePolled, useWidth } from "./hooks";
import { Failed, RunChoice } from "./parts";
import { go, useRoute, useThemeCount } from "./state";
import { AXIS, draw, LANE, phaseClass, spanAt, type Window } from "./timeline";

const POINTS = 4000;
const LEAST_SECONDS = 0.005;

export function Time({ runs, run }: { runs: Run[]; run: Run }) {
  const { params } = useRoute();
  const asked = [params.get("from"), params.get("to")].map((t) => (t === null ? null : Number(t)));
  const [from, to] = asked;
  const live = to === null;
  const answer = usePolled(
    (signal) => get<Timeline>(ofRun(run.id, "timeline"), { from, to, points: POINTS }, signal),
    [run.id, from, to],
    live && isLive(run) ? POLL_MS : 0,
  );
  const data = useNewest(answer.data, run.id);
  const spans = data?.spans ?? [];
  const start = data?.start ?? 0;
  const end = data?.end ?? 0;
  const first = spans.reduce((least, span) => Math.min(least, span.start), end);
  const view: Window = { from: Math.max(from ?? first, start), to: Math.min(to ?? end, end) };
  return (
    <>
      <div class="bar">
        <RunChoice runs={runs} run={run} />
        {data && spans.length > 0 && <Zoom view={view} start={start} end={end} />}
      </div>
      <Failed errors={[answer.error]} />
      {!data && !answer.error && <p class="empty">Reading…</p>}
      {data && !spans.length && <p class="empty">This run recorded no times here.</p>}
      {data && spans.length > 0 && (
        <>
          <Shares timeline={data} />
          <Lanes actors={data.actors} idle={data.idle} spans={spans} view={view} start={start} end={end} />
        </>
      )}
    </>
  );
}

/** Shows a range of time, within the record. */
function show({ from, to }: Window, start: number, end: number): void {
  const length = Math.min(Math.max(to - from, LEAST_SECONDS), end - start);
  const left = Math.min(Math.max(from, start), end - length);
  go({ from: left.toFixed(3), to: (left + length).toFixed(3) });
}

function zoomed({ from, to }: Window, factor: number, at = (from + to) / 2): Window {
  return { from: at - (at - from) * factor, to: at + (to - at) * factor };
}

function shifted({ from, to }: Window, part: number): Window {
  const by = (to - from) * part;
  return { from: from + by, to: to + by };
}

function Zoom({ view, start, end }: { view: Window; start: number; end: number }) {
  const set = (next: Window) => show(next, start, end);
  const actions: [string, string, string, () => void][] = [
    ["ArrowLeft", "←", "Earlier", () => set(shifted(view, -0.25))],
    ["ArrowRight", "→", "Later", () => set(shifted(view, 0.25))],
    ["+", "+", "Closer", () => set(zoomed(view, 0.5))],
    ["-", "−", "Farther", () => set(zoomed(view, 2))],
    ["a", "All", "The whole run", () => set({ from: start, to: end })],
    ["0", "Newest", "The newest steps, live", () => go({ from: null, to: null })],
  ];
  useKeys(Object.fromEntries(actions.map(([key, , , action]) => [key, action])));
  return (
    <>
      <span role="group" aria-label="Range of time" class="buttons">
        {actions.map(([key, label, title, action]) => (
          <button key={key} title={`${title} (${key})`} aria-label={title} onClick={action}>
            {label}
          </button>
        ))}
      </span>
      <span class="note">
        {clock(view.from)}, {duration(view.to - view.from)} of {duration(end - start)}
      </span>
    </>
  );
}

/** Where the time of the steps in sight went, and what they waited for. */
function Shares({ timeline }: { timeline: Timeline }) {
  const { shares, limits, limited_by: limitedBy, steps } = timeline;
  const bySize = (parts: { [name: string]: number }) =>
    Object.entries(parts)
      .filter(([, share]) => share >= 0.0005)
      .sort((a, b) => b[1] - a[1]);
  return (
    <section class="panel">
      <h2>
        Shares
        {limitedBy && <span class="limited"> · limited by {limitedBy}</span>}
        {steps && (
          <small>
            {" "}
            {steps[0] === steps[1] ? `step ${steps[0]}` : `steps ${steps[0]} to ${steps[1]}`}
          </small>
        )}
      </h2>
      <div class="stack" aria-hidden="true">
        {bySize(shares).map(([phase, share]) => (
          <i key={phase} class={phaseClass(phase)} style={{ flexGrow: share }} title={`${phase} ${percent(share)}`} />
        ))}
      </div>
      <ul class="shares">
        {bySize(shares).map(([phase, share]) => (
          <li key={phase}>
            <i class={`swatch ${phaseClass(phase)}`} /> {phase} <b>{percent(share)}</b>
          </li>
        ))}
      </ul>
      <p class="note">
        The steps waited for{" "}
        {bySize(limits)
          .map(([name, share]) => `${name} ${percent(share)}`)
          .join(", ")}
        .
      </p>
    </section>
  );
}

function about({ actor, phase, step, start, end, busy }: Span, origin: number): string {
  const parts = [`${actor}: ${phase}`, duration(end - start), `begins at ${duration(start - origin)}`];
  if (step !== null) parts.splice(1, 0, `step ${step}`);
  if (busy !== undefined) parts.push(`${duration(busy)} of work`);
  return parts.join(", ");
}

interface LanesProps {
  actors: string[];
  idle: Timeline["idle"];
  spans: Span[];
  view: Window;
  start: number;
  end: number;
}

function Lanes({ actors, idle, spans, view, start, end }: LanesProps) {
  const canvas = useRef<HTMLCanvasElement>(null);
  const [box, width] = useWidth<HTMLDivElement>();
  const [chosen, setChosen] = useState<Span | null>(null);
  const theme = useThemeCount();
  const drag = useRef<{ x: number; view: Window } | null>(null);
  useEffect(() => {
    if (canvas.current) draw({ canvas: canvas.current, width, actors, spans, window: view, origin: start, chosen });
  }, [width, actors, spans, view.from, view.to, chosen, theme]);

  const timeAt = (event: { clientX: number }) => {
    const left = canvas.current?.getBoundingClientRect().left ?? 0;
    return view.from + ((event.clientX - left) / width) * (view.to - view.from);
  };
  const find = (event: PointerEvent) => {
    const top = canvas.current?.getBoundingClientRect().top ?? 0;
    const actor = actors[Math.floor((event.clientY - top) / LANE)];
    const slack = ((view.to - view.from) / width) * 3;
    setChosen(actor === undefined ? null : spanAt(spans, actor, timeAt(event), slack));
  };
  const move = (event: PointerEvent) => {
    const from = drag.current;
    if (!from) return find(event);
    const by = ((from.x - event.clientX) / width) * (from.view.to - from.view.from);
    show({ from: from.view.from + by, to: from.view.to + by }, start, end);
  };
  useEffect(() => {
    // Preact's onWheel is passive, but the page must not scroll while the lanes zoom.
    const wheel = (event: WheelEvent) => {
      if (!event.ctrlKey && !event.shiftKey && Math.abs(event.deltaX) < Math.abs(event.deltaY)) {
        event.preventDefault();
        show(zoomed(view, event.deltaY < 0 ? 0.8 : 1.25, timeAt(event)), start, end);
      }
    };
    const element = canvas.current;
    element?.addEventListener("wheel", wheel, { passive: false });
    return () => element?.removeEventListener("wheel", wheel);
  });
  return (
    <section class="panel">
      <h2>Actors</h2>
      <p class="note span" aria-live="polite">
        {chosen
          ? about(chosen, start)
          : "Point at a span for its numbers; drag to move, wheel or + and − to zoom."}
      </p>
      <div class="lanes">
        <ul class="actors" style={{ paddingBottom: `${AXIS}px` }}>
          {actors.map((actor) => (
            <li key={actor} style={{ height: `${LANE}px` }} title={actor}>
              <span>{actor}</span>
              {idle[actor] !== undefined && <small>{percent(idle[actor])} idle</small>}
            </li>
          ))}
        </ul>
        <div class="canvas" ref={box}>
          <canvas
            ref={canvas} tabIndex={0} role="img"
            aria-label={`Timeline of ${actors.length} actors, ${spans.length} spans`}
            onPointerDown={(event) => {
              drag.current = { x: event.clientX, view };
              event.currentTarget.setPointerCapture(event.pointerId);
            }}
            onPointerUp={() => (drag.current = null)}
            onPointerCancel={() => (drag.current = null)}
            onPointerMove={move}
            onPointerLeave={() => setChosen(null)}
          />
        </div>
      </div>
    </section>
  );
}
