// The log of an actor, followed as it grows.
import { useEffect, useLayoutEffect, useRef, useState } from "preact/hooks";
import { get, ofRun, type Log, type Run } from "./api";
import { usePolled } from "./hooks";
import { Failed } from "./parts";
import { go, useRoute } from "./state";

/** Characters that stay on the page; the beginning of a longer log is left out. */
const KEPT = 400_000;

export function Logs({ run }: { run: Run }) {
  const { params } = useRoute();
  const listed = usePolled(
    (signal) => get<{ names: string[] }>(ofRun(run.id, "logs"), {}, signal),
    [run.id],
    10_000,
  );
  const names = listed.data?.names ?? [];
  const name = names.find((n) => n === params.get("log_of")) ?? names[0];
  return (
    <section class="panel">
      <h2>Logs</h2>
      <Failed errors={[listed.error]} />
      {listed.data && !names.length && <p class="empty">This run has no logs.</p>}
      {name !== undefined && (
        <>
          <div class="bar">
            <label>
              Log{" "}
              <select id="log" value={name} onChange={(event) => go({ log_of: event.currentTarget.value })}>
                {names.map((other) => (
                  <option key={other}>{other}</option>
                ))}
              </select>
            </label>
            <label>
              Lines with{" "}
              <input
                type="search" value={params.get("find") ?? ""} placeholder="text"
                onInput={(event) => go({ find: event.currentTarget.value })}
              />
            </label>
          </div>
          <Lines key={run.id + name} run={run} name={name} find={params.get("find") ?? ""} />
        </>
      )}
    </section>
  );
}

async function more(run: Run, name: string, signal: AbortSignal, before: Log | null): Promise<Log> {
  const path = ofRun(run.id, "logs");
  const log = await get<Log>(path, { name, offset: before?.next }, signal);
  // A file that was replaced by a shorter one is read from its end, as at first.
  if (before && log.size < before.next) return get<Log>(path, { name }, signal);
  return before ? { ...log, offset: before.offset, text: (before.text + log.text).slice(-KEPT) } : log;
}

function Lines({ run, name, find }: { run: Run; name: string; find: string }) {
  const log = usePolled<Log>((signal, before) => more(run, name, signal, before), [run.id, name]);
  const [follow, setFollow] = useState(true);
  const box = useRef<HTMLPreElement>(null);
  const text = log.data?.text ?? "";
  const wanted = find.toLowerCase();
  const shown = find
    ? text.split("\n").filter((line) => line.toLowerCase().includes(wanted)).join("\n")
    : text;
  useLayoutEffect(() => {
    if (follow && box.current) box.current.scrollTop = box.current.scrollHeight;
  }, [shown, follow]);
  useEffect(() => {
    const element = box.current;
    const scrolled = () => {
      if (element) setFollow(element.scrollHeight - element.scrollTop - element.clientHeight < 30);
    };
    element?.addEventListener("scroll", scrolled, { passive: true });
    return () => element?.removeEventListener("scroll", scrolled);
  }, []);
  return (
    <>
      <label>
        <input type="checkbox" id="follow" checked={follow} onChange={() => setFollow(!follow)} /> Follow
      </label>
      <Failed errors={[log.error]} />
      {log.data && log.data.offset > 0 && <p class="note">The beginning is not shown; the file has all of it.</p>}
      <pre class="log" ref={box} tabIndex={0} data-scrolls aria-label={`Log ${name}`}>
        {shown || (log.data ? "Nothing." : "Reading…")}
      </pre>
    </>
  );
}
