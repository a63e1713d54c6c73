// Small parts that several views use.
import type { Run } from "./api";
import { go } from "./state";

/** What the API refused, as text. */
export function Failed({ errors }: { errors: (string | null)[] }) {
  const found = [...new Set(errors.filter(Boolean))];
  if (!found.length) return null;
  return (
    <div class="failed" role="alert">
      {found.map((text) => (
        <pre key={text}>{text}</pre>
      ))}
    </div>
  );
}

/** The one run of a view. */
export function RunChoice({ runs, run }: { runs: Run[]; run: Run }) {
  if (runs.length < 2) return null;
  return (
    <label>
      Run{" "}
      <select
        id="run" value={run.id}
        onChange={(event) => go({ run: event.currentTarget.value, row: null, from: null, to: null, log_of: null })}
      >
        {runs.map((other) => (
          <option key={other.id} value={other.id}>
            {other.name}
          </option>
        ))}
      </select>
    </label>
  );
}
