// Draws spans of actors on a canvas: one lane an actor, all on one clock.
import type { Span } from "./api";
import { duration } from "./format";
import { color } from "./state";

export const LANE = 26;
export const AXIS = 22;

/** Unix seconds at the left and right edge. */
export interface Window {
  from: number;
  to: number;
}

/** Phases of one kind have one colour; other names get one of four more. */
const COLORS: [RegExp, string][] = [
  [/idle|wait/, "idle"],
  [/sync|publish|connect/, "sync"],
  [/ref/, "reference"],
  [/logprobs/, "logprobs"],
  [/reward|score/, "reward"],
  [/eval/, "evaluation"],
  [/update|train|forward|backward|optim/, "update"],
  [/rollout|sampl|generat/, "rollout"],
  [/checkpoint|save|snapshot|write/, "checkpoint"],
];

/** The colour of a phase; phases of rewards are the names of functions. */
export function phaseClass(phase: string, role = ""): string {
  if (role === "reward" || role === "reference") return `phase-${role}`;
  const known = COLORS.find(([pattern]) => pattern.test(phase));
  if (known) return `phase-${known[1]}`;
  let sum = 0;
  for (const letter of phase) sum += letter.charCodeAt(0);
  return `phase-other${sum % 4}`;
}

export function x(time: number, { from, to }: Window, width: number): number {
  return ((time - from) / (to - from)) * width;
}

/** Seconds between ticks of the axis: 1, 2 or 5 times a power of ten, or whole minutes. */
function tick(seconds: number, count: number): number {
  const least = seconds / Math.max(count, 1);
  if (least > 30) {
    const steps = [60, 120, 300, 600, 1200, 1800, 3600, 7200, 21600, 43200, 86400];
    return steps.find((step) => step >= least) ?? Math.ceil(least / 86400) * 86400;
  }
  const power = 10 ** Math.floor(Math.log10(least));
  return ([1, 2, 5, 10].find((step) => step * power >= least) ?? 10) * power;
}

interface Drawing {
  canvas: HTMLCanvasElement;
  width: number;
  actors: string[];
  spans: Span[];
  window: Window;
  /** What the axis counts from. */
  origin: number;
  chosen: Span | null;
}

export function draw({ canvas, width, actors, spans, window: view, origin, chosen }: Drawing): void {
  const scale = devicePixelRatio || 1;
  const height = actors.length * LANE + AXIS;
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(height * scale);
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  const c = canvas.getContext("2d");
  if (!c || !width) return;
  c.scale(scale, scale);
  c.font = "11px system-ui, sans-serif";
  c.textBaseline = "middle";
  drawAxis(c, width, height, view, origin);
  const colors = new Map<string, string>();
  const lane = new Map(actors.map((actor, i) => [actor, i]));
  for (const span of spans) {
    const i = lane.get(span.actor);
    if (i === undefined || span.end < view.from || span.start > view.to) continue;
    const left = Math.max(x(span.start, view, width), 0);
    const wide = Math.max(Math.min(x(span.end, view, width), width) - left, 0.7);
    const kind = phaseClass(span.phase, span.role);
    if (!colors.has(kind)) colors.set(kind, color(kind));
    c.fillStyle = colors.get(kind) as string;
    c.fillRect(left, i * LANE + 4, wide > 3 ? wide - 0.6 : wide, LANE - 8);
    if (wide > 46) {
      c.fillStyle = kind === "phase-idle" ? color("muted") : "#fff";
      const text = span.step === null ? span.phase : `${span.phase} ${span.step}`;
      if (c.measureText(text).width < wide - 8) c.fillText(text, left + 4, i * LANE + LANE / 2);
    }
    if (span === chosen) {
      c.strokeStyle = color("text");
      c.lineWidth = 2;
      c.strokeRect(left, i * LANE + 3, wide, LANE - 6);
    }
  }
}

function drawAxis(
  c: CanvasRenderingContext2D, width: number, height: number, view: Window, origin: number,
): void {
  const every = tick(view.to - view.from, width / 110);
  const [grid, muted] = [color("grid"), color("muted")];
  const first = Math.ceil((view.from - origin) / every) * every;
  for (let t = first; origin + t <= view.to; t += every) {
    const left = Math.round(x(origin + t, view, width)) + 0.5;
    c.strokeStyle = grid;
    c.beginPath();
    c.moveTo(left, 0);
    c.lineTo(left, height - AXIS + 4);
    c.stroke();
    c.fillStyle = muted;
    const text = t === 0 ? "0" : duration(Number(t.toPrecision(8)));
    if (left + 3 + c.measureText(text).width < width) c.fillText(text, left + 3, height - AXIS / 2);
  }
}

export function spanAt(spans: Span[], actor: string, time: number, slack: number): Span | null {
  // The last one that fits is the one drawn on top.
  return (
    spans.findLast((s) => s.actor === actor && s.start <= time && time <= s.end) ??
    spans.findLast((s) => s.actor === actor && s.start - slack <= time && time <= s.end + slack) ??
    null
  );
}
