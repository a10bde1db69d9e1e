// Makes fields.json from the package @elastic/ecs: in the folder where it is
// unpacked, `node extract.mjs > fields.json`. Takes the field sets that events
// use, without what is only to be read.
import { createRequire } from "module";
const { EcsFlat } = createRequire(process.cwd() + "/")("./build/commonjs/ecs_flat.js");
const SETS = /^(@timestamp|message|(agent|container|destination|dns|ecs|error|event|gen_ai|host|http|network|process|related|rule|service|source|url|user)\.)/;
const DEEP = /\b(as|code_signature|elf|entity|geo|macho|origin|parent\.(?!pid)|pe|target|session_leader|entry_leader|group_leader|previous|changes|effective)\b/;
const lines = Object.entries(EcsFlat)
  .filter(([name]) => SETS.test(name) && !DEEP.test(name))
  .map(([name, f]) => {
    const out = { type: f.type };
    if (f.normalize.includes("array")) out.array = true;
    if (f.allowed_values) {
      out.allowed = Object.fromEntries(f.allowed_values.map((v) => [v.name, v.expected_event_types ?? []]));
    }
    if (f.expected_values) out.expected = f.expected_values;
    return JSON.stringify(name) + ":" + JSON.stringify(out);
  });
console.log("{\n" + lines.join(",\n") + "\n}");
