// One chart of one metric over steps, on uPlot.
import { useEffect, useRef } from "preact/hooks";
import uPlot from "uplot";
import { num } from "./format";
import { useWidth } from "./hooks";
import { color, useThemeCount } from "./state";
import type { Numbers } from "./series";

export interface Curve {
  label: string;
  color: string;
  step: number[];
  values: Numbers;
  /** Drawn pale below the smoothed curve, and not read out. */
  faint?: boolean;
  /** Bounds of a band around the curve. */
  low?: Numbers;
  high?: Numbers;
}

interface Props {
  title: string;
  curves: Curve[];
  log: boolean;
  /** Steps shown; null shows all. */
  range: [number, number] | null;
  onRange: (range: [number, number] | null) => void;
  onRemove?: () => void;
}

const HEIGHT = 190;
/** A curve of at most so many values shows each as a point. */
const FEW = 20;

interface Line {
  curve: Curve;
  kind: "line" | "bound";
}

/** The aligned arrays of uPlot, the lines that they are, and the bands between them. */
function aligned(curves: Curve[], log: boolean) {
  const lines: Line[] = [];
  const tables: uPlot.AlignedData[] = [];
  const bands: uPlot.Band[] = [];
  const positive = (values: Numbers) =>
    log ? values.map((v) => (v !== null && v > 0 ? v : null)) : values;
  for (const curve of curves) {
    const columns = [positive(curve.values)];
    lines.push({ curve, kind: "line" });
    if (curve.low && curve.high) {
      columns.push(positive(curve.high), positive(curve.low));
      bands.push({ series: [lines.length + 1, lines.length + 2], fill: `${curve.color}33` });
      lines.push({ curve, kind: "bound" }, { curve, kind: "bound" });
    }
    tables.push([curve.step, ...columns] as uPlot.AlignedData);
  }
  const data = tables.length ? uPlot.join(tables) : ([[]] as unknown as uPlot.AlignedData);
  return { data, lines, bands };
}

function seriesOf({ curve, kind }: Line): uPlot.Series {
  if (kind === "bound") return { stroke: "transparent", width: 0, spanGaps: true, points: { show: false } };
  const stroke = curve.faint ? `${curve.color}44` : curve.color;
  const few = curve.values.length <= FEW && !curve.faint;
  return { label: curve.label, stroke, width: curve.faint ? 1 : 1.75, spanGaps: true, points: { show: few, size: 5 } };
}

function axis(values: uPlot.Axis.DynamicValues, size: number): uPlot.Axis {
  const grid = { stroke: color("grid"), width: 1 };
  return { stroke: color("muted"), grid, ticks: grid, values, size, font: "11px system-ui, sans-serif" };
}

export function Chart(props: Props) {
  const { title, curves, log, range } = props;
  const [box, width] = useWidth<HTMLDivElement>();
  const readout = useRef<HTMLDivElement>(null);
  const plot = useRef<uPlot | null>(null);
  const current = useRef(props);
  current.current = props;
  const shape = useRef<Line[]>([]);
  const theme = useThemeCount();
  const key = curves.map((c) => [c.label, c.color, c.faint, !!c.low, c.values.length <= FEW]).join("|");

  useEffect(() => {
    if (!width || !box.current) return;
    const { data, lines, bands } = aligned(current.current.curves, log);
    shape.current = lines;
    const u = new uPlot(
      {
        width,
        height: HEIGHT,
        padding: [8, 14, 0, 0],
        legend: { show: false },
        cursor: { sync: { key: "steps" }, drag: { x: true, y: false }, points: { size: 6 } },
        scales: {
          x: { time: false, range: (_, min, max) => current.current.range ?? widened(min, max) },
          y: { distr: log ? 3 : 1 },
        },
        axes: [
          axis((_, splits) => splits.map((s) => (Number.isInteger(s) ? num(s) : "")), 28),
          axis((_, splits) => splits.map((s) => (s === null ? "" : num(s))), 54),
        ],
        series: [{}, ...lines.map(seriesOf)],
        bands,
        hooks: {
          setCursor: [(self) => showValues(readout.current, self, shape.current)],
          setSelect: [
            (self) => {
              const { left, width: wide } = self.select;
              if (wide < 3) return;
              current.current.onRange([
                Math.round(self.posToVal(left, "x")),
                Math.round(self.posToVal(left + wide, "x")),
              ]);
              self.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
            },
          ],
        },
      },
      data,
      box.current,
    );
    plot.current = u;
    showValues(readout.current, u, lines);
    const reset = () => current.current.onRange(null);
    u.over.addEventListener("dblclick", reset);
    return () => {
      plot.current = null;
      u.destroy();
    };
  }, [width, log, key, theme]);

  useEffect(() => {
    const u = plot.current;
    if (!u) return;
    const { data, lines } = aligned(curves, log);
    shape.current = lines;
    u.setData(data);
    showValues(readout.current, u, lines);
  }, [curves, range?.[0], range?.[1]]);

  const last = curves.findLast((curve) => !curve.faint);
  const end = last?.values.findLast((v) => v !== null);
  return (
    <section class="panel chart" aria-label={title}>
      <header>
        <h3 title={title}>{title}</h3>
        {props.onRemove && (
          <button class="plain" aria-label={`Remove ${title}`} onClick={props.onRemove}>
            ✕
          </button>
        )}
      </header>
      <div class="readout" ref={readout} />
      <div
        class="plot"
        ref={box}
        tabIndex={0}
        role="img"
        aria-label={`${title} over steps, ${last?.label ?? "no curve"}: ${num(end)} at last. Left and right move the cursor, plus and minus zoom.`}
        onKeyDown={(event) => plot.current && steer(event, plot.current, props)}
      />
    </section>
  );
}

function widened(min: number | null, max: number | null): [number, number] {
  if (min === null || max === null) return [0, 1];
  return min === max ? [min - 0.5, max + 0.5] : [min, max];
}

/** The values at the cursor, or the last ones. */
function showValues(out: HTMLDivElement | null, u: uPlot, lines: Line[]): void {
  if (!out) return;
  const xs = u.data[0];
  const at = u.cursor.idx ?? xs.length - 1;
  const parts: Node[] = [];
  if (xs.length) parts.push(text("span", `step ${num(xs[at])}`));
  lines.forEach((line, i) => {
    const values = u.data[i + 1];
    if (line.kind === "bound" || line.curve.faint || !values) return;
    let near = at;
    while (near > 0 && values[near] == null) near -= 1;
    const value = text("b", num(values[near] as number | null));
    value.style.color = line.curve.color;
    value.title = line.curve.label;
    parts.push(value);
  });
  out.replaceChildren(...parts);
}

function text(tag: string, content: string): HTMLElement {
  const element = document.createElement(tag);
  element.textContent = content;
  return element;
}

function steer(event: KeyboardEvent, u: uPlot, props: Props): void {
  const xs = u.data[0];
  const [min, max] = [u.scales.x.min ?? 0, u.scales.x.max ?? 1];
  const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  const zoom = { "+": 0.5, "-": 2 }[event.key];
  if (move) {
    const at = Math.min(Math.max((u.cursor.idx ?? xs.length - 1) + move, 0), xs.length - 1);
    u.setCursor({ left: u.valToPos(xs[at], "x"), top: 10 });
  } else if (zoom) {
    const center = u.cursor.idx == null ? (min + max) / 2 : xs[u.cursor.idx];
    const half = Math.max(((max - min) * zoom) / 2, 1);
    const next = [Math.round(center - half), Math.round(center + half)] as [number, number];
    props.onRange(xs.length && next[0] <= xs[0] && next[1] >= xs[xs.length - 1] ? null : next);
  } else return;
  event.preventDefault();
  event.stopPropagation();
}
