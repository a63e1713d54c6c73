// Bundles src/ into ../static, which is committed and shipped, so that a user needs no npm.
// Another folder may be named. build.json records the hash of the sources: tests/unit/dashboard/test_bundle.py computes the same.
import { createHash } from "node:crypto";
import { cpSync, readFileSync, readdirSync, rmSync, writeFileSync, mkdirSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { build } from "esbuild";

const here = dirname(fileURLToPath(import.meta.url));
const out = process.argv[2] ?? join(here, "..", "static");
const SHIPPED = ["@tanstack/virtual-core", "preact", "uplot"];

function sha256(bytes) {
  return createHash("sha256").update(bytes).digest("hex");
}

/** One hash over names and contents, in the order of the names. */
function sourceHash() {
  const names = ["build.mjs", "package-lock.json", "package.json", "tsconfig.json"];
  names.push(...readdirSync(join(here, "src")).map((name) => `src/${name}`));
  const lines = names.sort().map((name) => `${name} ${sha256(readFileSync(join(here, name)))}\n`);
  return sha256(lines.join(""));
}

rmSync(out, { recursive: true, force: true });
mkdirSync(out);
await build({
  entryPoints: { app: join(here, "src/main.tsx") },
  outdir: out,
  bundle: true,
  format: "esm",
  target: "es2023",
  minify: true,
  legalComments: "none",
  logLevel: "warning",
});
for (const name of ["index.html", "icon.svg"]) cpSync(join(here, "src", name), join(out, name));

const licences = SHIPPED.map((name) => {
  const folder = join(here, "node_modules", name);
  const { version, license } = JSON.parse(readFileSync(join(folder, "package.json")));
  const text = readFileSync(join(folder, "LICENSE"), "utf8").trim();
  return `${name} ${version} (${license})\n\n${text}\n`;
});
writeFileSync(
  join(out, "LICENSES.txt"),
  `app.js and app.css contain these packages.\n\n${licences.join("\n----\n\n")}`,
);

const files = {};
for (const name of readdirSync(out).sort()) files[name] = sha256(readFileSync(join(out, name)));
writeFileSync(join(out, "build.json"), JSON.stringify({ sources: sourceHash(), files }, null, 1) + "\n");
