// Numbers, times and values as texts.
import type { Value } from "./api";

/** A number in at most five digits: 0.123, 1,234, 12.3k, 1.2e-6. */
export function num(value: number | null | undefined): string {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size < 1e-3 || size >= 1e9) return Number(value.toPrecision(3)).toExponential();
  if (size >= 1e5) return value >= 1e6 ? `${trim(value / 1e6)}M` : `${trim(value / 1e3)}k`;
  if (Number.isInteger(value) || size >= 1000) return Math.round(value).toLocaleString("en-US");
  return trim(value);
}

function trim(value: number): string {
  return String(Number(value.toPrecision(4)));
}

export function signed(value: number): string {
  return value > 0 ? `+${num(value)}` : num(value);
}

export function duration(seconds: number | null): string {
  if (seconds === null) return "–";
  if (seconds < 0.001) return `${Math.round(seconds * 1e6)} µs`;
  if (seconds < 1) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 60) return `${trim(seconds)} s`;
  const minutes = Math.floor(seconds / 60);
  if (minutes < 60) return `${minutes} min ${Math.floor(seconds % 60)} s`;
  const hours = Math.floor(minutes / 60);
  return hours < 48 ? `${hours} h ${minutes % 60} min` : `${Math.floor(hours / 24)} d ${hours % 24} h`;
}

export function percent(part: number): string {
  return `${(part * 100).toFixed(part < 0.1 ? 1 : 0)}%`;
}

export function clock(unix: number): string {
  return new Date(unix * 1000).toLocaleString("sv-SE");
}

/** A value of a row or config in one line. */
export function inLine(value: Value | undefined): string {
  if (value === null || value === undefined) return "–";
  if (typeof value === "number") return num(value);
  if (typeof value === "string") return value;
  if (Array.isArray(value)) return value.map(inLine).join(", ");
  if (typeof value === "object") {
    return Object.entries(value)
      .map(([name, inner]) => `${name} ${inLine(inner)}`)
      .join(" · ");
  }
  return String(value);
}
