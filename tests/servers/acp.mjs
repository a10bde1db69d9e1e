// An agent of the Agent Client Protocol on its own SDK: newline JSON-RPC with
// an `initialize`, and not MCP.
//
//   acp.mjs MODULES
import { createRequire } from "node:module";
import { Readable, Writable } from "node:stream";
import { pathToFileURL } from "node:url";

const here = createRequire(process.argv[2] + "/x.cjs");
const acp = await import(pathToFileURL(here.resolve("@agentclientprotocol/sdk")));
const { agent: method } = acp.methods;

const stream = acp.ndJsonStream(Writable.toWeb(process.stdout), Readable.toWeb(process.stdin));
acp
  .agent({ name: "tests" })
  .onRequest(method.initialize, () => ({
    protocolVersion: 1,
    agentInfo: { name: "tests", version: "1.0.0" },
    agentCapabilities: { loadSession: false, mcpCapabilities: { http: true } },
    authMethods: [],
  }))
  .onRequest(method.session.new, () => ({ sessionId: "one" }))
  .onRequest(method.session.prompt, () => ({ stopReason: "end_turn" }))
  .connect(stream);
