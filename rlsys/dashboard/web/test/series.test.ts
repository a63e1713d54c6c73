// The pure parts of the page; `npm test` bundles and runs them in Node.
import assert from "node:assert/strict";
import { test } from "node:test";
import type { Run } from "../src/api";
import { band, groupSeeds, merge, namesLike, points, smooth } from "../src/series";
import { pieces } from "../src/turns";

const run = (id: string) => ({ id, name: id, method: "grpo" }) as Run;

test("newer rows replace the steps that both have", () => {
  const older = { step: [1, 2, 3], columns: { a: [1, 2, 3] }, last_step: 3 };
  const newer = { step: [3, 4], columns: { a: [30, 4], b: [5, null] }, last_step: 4 };
  assert.deepEqual(merge(older, newer), {
    step: [1, 2, 3, 4],
    columns: { a: [1, 2, 30, 4], b: [null, null, 5, null] },
    last_step: 4,
  });
});

test("nothing newer changes nothing", () => {
  const older = { step: [1], columns: { a: [1] }, last_step: 1 };
  assert.deepEqual(merge(older, { step: [], columns: {}, last_step: 1 }), older);
});

test("steps without a number are not points", () => {
  const metrics = { step: [0, 1, 2], columns: { a: [null, 5, null] }, last_step: 2 };
  assert.deepEqual(points(metrics, "a"), [[1], [5]]);
  assert.deepEqual(points(metrics, "absent"), [[], []]);
});

test("smoothing keeps constants, starts at the first value, and 0 is off", () => {
  const constant = smooth([2, 2, 2], 0.9);
  constant.forEach((value) => assert.ok(Math.abs(value - 2) < 1e-12));
  assert.ok(Math.abs(smooth([7, 0], 0.99)[0] - 7) < 1e-12);
  assert.deepEqual(smooth([1, 5], 0), [1, 5]);
});

test("a band is over the runs that reached a step, on straight lines between points", () => {
  const found = band([
    [[0, 2], [0, 2]],
    [[0, 1], [2, 3]],
  ]);
  assert.deepEqual(found.step, [0, 1, 2]);
  assert.deepEqual(found.mean, [1, 2, 2]);
  assert.deepEqual(found.low, [0, 1, 2]);
  assert.deepEqual(found.high, [2, 3, 2]);
});

test("runs that differ in their seed alone are one group", () => {
  const differences = {
    seed: { a: 0, b: 1, c: 0 },
    output_dir: { a: "x", b: "y", c: "z" },
    "policy.learning_rate": { a: 0.1, b: 0.1, c: 0.2 },
  };
  const groups = groupSeeds(["a", "b", "c"].map(run), { differences, common: {} });
  assert.deepEqual(groups.map((g) => g.runs.map((r) => r.id)), [["a", "b"], ["c"]]);
  assert.deepEqual(groups.map((g) => g.label), ["learning_rate 0.1", "c"]);
});

test("a * stands for any text, and other letters for themselves", () => {
  const names = ["rewards/a/mean", "rewards/b/mean", "reward", "memory(GiB)"];
  assert.deepEqual(namesLike("rewards/*/mean", names), names.slice(0, 2));
  assert.deepEqual(namesLike("memory(GiB)", names), ["memory(GiB)"]);
  assert.deepEqual(namesLike("mem*(GiB)", names), ["memory(GiB)"]);
  assert.deepEqual(namesLike("nothing", names), []);
});

test("thinking, tool calls inside it, and the answer are pieces", () => {
  const text = '<think>a<tool_call>{"x": 1}</tool_call>b</think><answer>c</answer>d';
  const found = pieces(text).map(({ kind, text: content }) => [kind, content]);
  assert.deepEqual(found, [
    ["think", "a"],
    ["tool_call", '{"x": 1}'],
    ["think", "b"],
    ["answer", "c"],
    ["text", "d"],
  ]);
});

test("a cut completion, a mark that nothing opened, and turns lose no text", () => {
  assert.deepEqual(pieces("<think>on and on")[0], { kind: "think", label: "think", text: "on and on" });
  assert.deepEqual(pieces("so</think> it")[0].text, "so</think> it");
  const turns = pieces("<|im_start|>user\nhi<|im_start|>assistant\nyes");
  assert.deepEqual(turns.map((p) => p.label || p.text), ["user", "hi", "assistant", "yes"]);
});

test("an empty tag is shown, and text between tags that is blank is not", () => {
  const found = pieces("<think></think>\n<answer>5</answer>").map((piece) => [piece.kind, piece.text]);
  assert.deepEqual(found, [["think", ""], ["answer", "5"]]);
});

test("other markup stays text", () => {
  const text = "<script>alert(1)</script><b>x</b>";
  assert.deepEqual(pieces(text), [{ kind: "text", label: "", text }]);
});
