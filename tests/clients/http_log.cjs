// A fetch for the TypeScript SDKs that keeps a log of what it sends and receives.
"use strict";

exports.tapped = (log, described) => {
  function message(way, text) {
    let read;
    try {
      read = JSON.parse(text.toString());
    } catch {
      return;
    }
    log({ process: 0, way, bytes: text.length, ...described(read) });
  }

  // The messages in a response: JSON, or the events of a stream (WHATWG HTML section 9.2).
  function messages(kind) {
    const events = kind.startsWith("text/event-stream");
    let rest = Buffer.alloc(0);
    let data = [];
    let event = "";
    function line(text) {
      const colon = text.indexOf(":");
      const name = colon < 0 ? text : text.subarray(0, colon);
      let value = colon < 0 ? Buffer.alloc(0) : text.subarray(colon + 1);
      if (value[0] === 32) value = value.subarray(1);
      if (text.length === 0) {
        const whole = Buffer.concat(data.flatMap((d, i) => (i ? [Buffer.from("\n"), d] : [d])));
        if (whole.length && (event === "" || event === "message")) message("received", whole);
        data = [];
        event = "";
      } else if (name.toString() === "data") data.push(value);
      else if (name.toString() === "event") event = value.toString();
    }
    return {
      take(piece) {
        rest = Buffer.concat([rest, piece]);
        if (!events) return;
        let from = 0;
        for (let end; (end = rest.indexOf(10, from)) >= 0; from = end + 1) {
          line(rest.subarray(from, rest[end - 1] === 13 && end > from ? end - 1 : end));
        }
        rest = rest.subarray(from);
      },
      end() {
        if (!events && rest.length) message("received", rest);
      },
    };
  }

  return async (url, init = {}) => {
    const text = Buffer.from(init.body ?? "");
    if (text.length) message("sent", text);
    const asked = { method: init.method ?? "GET", sent: text.length };
    log({ asked });
    const response = await fetch(url, init);
    const exchange = { ...asked, status: response.status };
    log({ began: exchange, named: response.headers.has("mcp-session-id") });
    if (!response.body || [101, 204, 205, 304].includes(response.status)) {
      log({ ended: { ...exchange, received: 0 } });
      return response;
    }
    const from = response.body.getReader();
    const read = messages(response.headers.get("content-type") ?? "");
    let received = 0;
    let cancelled = false;
    const body = new ReadableStream({
      async pull(to) {
        const { done, value } = await from.read();
        if (done) {
          if (cancelled) return;
          read.end();
          log({ ended: { ...exchange, received } });
          return to.close();
        }
        received += value.length;
        read.take(Buffer.from(value));
        to.enqueue(value);
      },
      cancel(why) {
        cancelled = true;
        return from.cancel(why);
      },
    });
    const { status, statusText, headers } = response;
    return Object.defineProperty(new Response(body, { status, statusText, headers }), "url", {
      value: response.url,
    });
  };
};
