// The tokens of a completion, coloured by what is known about each.
import type { Tokens as Arrays } from "./api";
import { num, percent, signed } from "./format";
import { go, useRoute } from "./state";

const COLORINGS = ["logprob", "mismatch", "advantage"] as const;
type Coloring = (typeof COLORINGS)[number];
const MEANING: { [coloring in Coloring]: string } = {
  logprob: "the darker, the less probable for the rollout engine",
  mismatch: "policy less rollout log-prob: blue where the policy finds the token more probable, red where less",
  advantage: "green is reinforced, red is discouraged",
};

function valuesOf(tokens: Arrays, coloring: Coloring): number[] | null {
  const { rollout_logprobs: rollout, logprobs } = tokens;
  if (coloring === "logprob") return rollout ?? logprobs;
  if (coloring === "advantage") return tokens.advantages;
  return rollout && logprobs && logprobs.map((value, i) => value - rollout[i]);
}

/** The class of the colour: six strengths of each sign. */
function shade(value: number, greatest: number, coloring: Coloring): string {
  const level = Math.min(5, Math.ceil((Math.abs(value) / greatest) * 5 - 1e-9));
  if (!level || Number.isNaN(level)) return "";
  const sign = coloring === "logprob" ? "p" : value > 0 ? "u" : "d";
  return `tok ${coloring}-${sign}${level}`;
}

export function Tokens({ tokens }: { tokens: Arrays }) {
  const { params } = useRoute();
  const possible = COLORINGS.filter((name) => valuesOf(tokens, name));
  const coloring = possible.find((name) => name === params.get("color")) ?? possible[0];
  if (!coloring) return null;
  const values = valuesOf(tokens, coloring) as number[];
  // The darkest shade is for 5 nats or more; differences are small, so their own greatest counts.
  const own = values.reduce((most, value) => Math.max(most, Math.abs(value)), 0);
  const greatest = coloring === "logprob" ? 5 : own || 1;
  return (
    <section>
      <h3>Tokens</h3>
      <p class="choices" role="radiogroup" aria-label="Colour by">
        {COLORINGS.map((name) => (
          <label key={name} class={possible.includes(name) ? "" : "absent"}>
            <input
              type="radio" name="coloring" checked={name === coloring} disabled={!possible.includes(name)}
              onChange={() => go({ color: name })}
            />{" "}
            {name}
          </label>
        ))}
      </p>
      <p class="note">
        {MEANING[coloring]}
        {coloring !== "logprob" && `; the strongest colour is ${num(own)}`}. Point at a token for its numbers.
      </p>
      <div class="text tokens">
        {values.map((value, i) => (
          <span key={i} class={shade(value, greatest, coloring)} title={about(tokens, i)}>
            {tokens.text ? tokens.text[i] : `${tokens.ids[i]} `}
          </span>
        ))}
      </div>
    </section>
  );
}

function about(tokens: Arrays, i: number): string {
  const { rollout_logprobs: rollout, logprobs, advantages } = tokens;
  const lines = [`token ${i}, id ${tokens.ids[i]}`];
  if (rollout) lines.push(`rollout log-prob ${num(rollout[i])} (${percent(Math.exp(rollout[i]))})`);
  if (logprobs) lines.push(`policy log-prob ${num(logprobs[i])}`);
  if (rollout && logprobs) lines.push(`mismatch ${signed(logprobs[i] - rollout[i])}`);
  if (advantages) lines.push(`advantage ${signed(advantages[i])}`);
  return lines.join("\n");
}
