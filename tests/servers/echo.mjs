// An MCP server of node's standard library alone, both eras: `echo`, `fail`
// and `refuse` as echo.py has them. Replies that are ready together leave in
// one writev, as node's streams do it.
import { createInterface } from "node:readline";

const META = "io.modelcontextprotocol/";
const ANY = { type: "object", properties: {} };
const INFO = { name: "echo-js", version: "1.0.0" };
const wait = (seconds) => new Promise((done) => setTimeout(done, seconds * 1000));
const text = (value, more = {}) => ({ content: [{ type: "text", text: value }], ...more });

async function call({ name, arguments: given = {} }) {
  if (given.delay) await wait(given.delay);
  if (name === "echo") return text(given.text ?? "x".repeat(given.bytes ?? 1));
  if (name === "fail") return text("it failed", { isError: true });
  throw { code: name === "refuse" ? (given.code ?? -32603) : -32602, message: "refused" };
}

async function result(method, params) {
  switch (method) {
    case "initialize":
      return { protocolVersion: params.protocolVersion, capabilities: { tools: {} }, serverInfo: INFO };
    case "server/discover":
      return { supportedVersions: ["2026-07-28"], capabilities: { tools: {} }, ttlMs: 0, cacheScope: "private" };
    case "ping":
      return {};
    case "tools/list": {
      const tools = ["echo", "fail", "refuse"].map((name) => ({ name, description: name, inputSchema: ANY }));
      return params._meta ? { tools, ttlMs: 0, cacheScope: "private" } : { tools };
    }
    case "tools/call":
      return call(params);
    default:
      throw { code: -32601, message: "no such method" };
  }
}

for await (const line of createInterface({ input: process.stdin, crlfDelay: Infinity })) {
  const { id, method, params = {} } = JSON.parse(line);
  if (id === undefined || method === undefined) continue;
  const modern = params._meta?.[META + "protocolVersion"] !== undefined;
  result(method, params)
    .then((r) => ({ result: modern ? { resultType: "complete", ...r, _meta: { [META + "serverInfo"]: INFO } } : r }))
    .catch((error) => ({ error: { code: error.code ?? -32603, message: error.message } }))
    .then((reply) => process.stdout.write(JSON.stringify({ ...reply, jsonrpc: "2.0", id }) + "\n"));
}
