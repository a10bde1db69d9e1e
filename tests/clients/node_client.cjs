// An MCP client on the TypeScript SDK, v1 or v2, that keeps a log of its wire.
//
//   node_client.cjs SESSION      SESSION: a JSON file, see tests/src/mcp/session.rs
//
// The log is what python_client.py keeps: lengths of the messages on the server's
// stdio or its HTTP connections, what was in them, and what the SDK told its caller.
"use strict";
const fs = require("node:fs");
const path = require("node:path");
const children = require("node:child_process");

const session = JSON.parse(fs.readFileSync(process.argv[2], "utf8"));
const out = fs.openSync(session.log, "w");
const log = (record) => fs.writeSync(out, JSON.stringify(record) + "\n");

function described(message) {
  if (Array.isArray(message)) return {};
  const { id, method, params = {}, result, error } = message;
  const version = params._meta?.["io.modelcontextprotocol/protocolVersion"];
  const kept = { version, id, method, name: params.name, uri: params.uri, requestId: params.requestId };
  if (error) kept.error = error.code;
  else if (result) {
    const { isError, resultType, protocolVersion } = result;
    kept.result = { isError, resultType, protocolVersion };
  }
  return kept;
}

function lines(process, way) {
  let rest = [];
  return (data) => {
    let from = 0;
    for (let end; (end = data.indexOf(10, from)) >= 0; from = end + 1) {
      const line = Buffer.concat([...rest, data.subarray(from, end)]);
      rest = [];
      log({ process, way, bytes: line.length, ...described(JSON.parse(line.toString())) });
    }
    if (from < data.length) rest.push(data.subarray(from));
  };
}

// Before the SDK takes its own reference.
const spawn = children.spawn;
children.spawn = (...args) => {
  const child = spawn(...args);
  const [sent, received] = [lines(child.pid, "sent"), lines(child.pid, "received")];
  const write = child.stdin.write.bind(child.stdin);
  child.stdin.write = (data, ...more) => {
    sent(Buffer.from(data));
    return write(data, ...more);
  };
  child.stdout.on("data", received);
  return child;
};

const here = require("node:module").createRequire(path.join(session.modules, "x.cjs"));

// To a server that is started, or to one that listens already.
function transport({ StdioClientTransport, StreamableHTTPClientTransport, SSEClientTransport }) {
  if (session.url) {
    const Transport = session.transport === "sse" ? SSEClientTransport : StreamableHTTPClientTransport;
    const fetch = require("./http_log.cjs").tapped(log, described);
    return new Transport(new URL(session.url), { fetch });
  }
  const [command, ...args] = session.command;
  const env = { ...process.env, ...session.env };
  // The SDKs' own limit is 10 MiB for a message.
  return new StdioClientTransport({ command, args, env, cwd: session.cwd, maxBufferSize: 1 << 28 });
}

function connectable() {
  const info = { name: `driver-node-v${session.sdk}`, version: "1.0.0" };
  const capabilities = { sampling: {}, elicitation: {}, roots: {} };
  const answers = {
    "sampling/createMessage": { role: "assistant", content: { type: "text", text: "five" }, model: "none" },
    "elicitation/create": { action: "accept", content: {} },
    "roots/list": { roots: [] },
  };
  if (session.sdk === 1) {
    const { Client } = here("@modelcontextprotocol/sdk/client/index.js");
    const transports = {
      ...here("@modelcontextprotocol/sdk/client/stdio.js"),
      ...here("@modelcontextprotocol/sdk/client/streamableHttp.js"),
      ...here("@modelcontextprotocol/sdk/client/sse.js"),
    };
    const types = here("@modelcontextprotocol/sdk/types.js");
    const client = new Client(info, { capabilities });
    client.setRequestHandler(types.CreateMessageRequestSchema, () => answers["sampling/createMessage"]);
    client.setRequestHandler(types.ElicitRequestSchema, () => answers["elicitation/create"]);
    client.setRequestHandler(types.ListRootsRequestSchema, () => answers["roots/list"]);
    return [client, transport(transports)];
  }
  const { Client, StreamableHTTPClientTransport, SSEClientTransport } = here("@modelcontextprotocol/client");
  const { StdioClientTransport } = here("@modelcontextprotocol/client/stdio");
  const client = new Client(info, { capabilities, versionNegotiation: { mode: session.mode } });
  for (const [method, answer] of Object.entries(answers)) client.setRequestHandler(method, () => answer);
  return [client, transport({ StdioClientTransport, StreamableHTTPClientTransport, SSEClientTransport })];
}

// In the sensor's words.
async function call(client, todo) {
  const options = { timeout: 600_000, maxTotalTimeout: 600_000 };
  if (todo.progress) options.onprogress = () => {};
  if (todo.cancel_after !== undefined) {
    const abort = new AbortController();
    options.signal = abort.signal;
    setTimeout(() => abort.abort("no longer wanted"), todo.cancel_after * 1000);
  }
  const params = { name: todo.tool, arguments: todo.arguments ?? {} };
  try {
    const result = await (session.sdk === 1
      ? client.callTool(params, undefined, options)
      : client.callTool(params, options));
    return result.isError ? "tool_error" : "ok";
  } catch (error) {
    if (options.signal?.aborted) return "cancelled";
    if (typeof error.code === "number") return `rpc_error ${error.code}`;
    throw error;
  }
}

async function act(client, todo) {
  switch (todo.do ?? "call") {
    case "call":
      return log({ call: todo.tool, outcome: await call(client, todo) });
    case "tools":
      return client.listTools();
    case "prompt":
      return client.getPrompt({ name: todo.name, arguments: todo.arguments });
    case "resource":
      return client.readResource({ uri: todo.uri });
    case "wait":
      while (!fs.existsSync(todo.file)) await new Promise((done) => setTimeout(done, 10));
      return;
    default:
      throw new Error(`do ${todo.do}?`);
  }
}

async function main() {
  const [client, transport] = connectable();
  await client.connect(transport);
  for (const { calls, concurrency = 1 } of session.phases) {
    const todos = calls.flatMap((c) => Array.from({ length: c.times ?? 1 }, () => c));
    const worker = async () => {
      for (let todo; (todo = todos.shift()); ) await act(client, todo);
    };
    await Promise.all(Array.from({ length: concurrency }, worker));
  }
  await client.close();
}

main().then(
  () => process.exit(0),
  (error) => {
    console.error(error);
    process.exit(1);
  },
);
