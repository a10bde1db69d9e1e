//! Fields of the Elastic Common Schema, as far as events need them. Names, types
//! and meanings are the schema's; the tests hold them to it.

use serde_json::Value;

object!(
    /// A document.
    Record {
        #[serde(rename = "@timestamp")]
        timestamp: String,
        message: String,
        ecs: Ecs,
        event: EventFields,
        agent: Agent,
        host: Host,
        service: Service,
        process: Process,
        user: User,
        container: Id,
        source: End,
        destination: End,
        network: Network,
        dns: Dns,
        http: Http,
        url: Url,
        rule: Rule,
        error: ErrorFields,
        gen_ai: GenAi,
        related: Related,
        /// Fields of our own, under their native names.
        mcp_sensor: Value,
    }
);

object!(Ecs { version: &'static str });

object!(EventFields {
    id: String,
    sequence: u64,
    kind: &'static str,
    category: Vec<&'static str>,
    r#type: Vec<&'static str>,
    outcome: &'static str,
    action: &'static str,
    code: String,
    reason: String,
    severity: i64,
    duration: i64,
    start: String,
    end: String,
    module: &'static str,
    dataset: &'static str,
    provider: &'static str,
});

object!(Agent { id: String, ephemeral_id: String, r#type: &'static str, version: String });

object!(Host { id: String, hostname: String, os: Os });

object!(Os { r#type: &'static str, kernel: String });

object!(Service { name: String, r#type: &'static str, node: Node });

object!(Node { name: String });

object!(Process {
    pid: i64,
    name: String,
    executable: String,
    args: Vec<String>,
    args_count: usize,
    command_line: String,
    parent: Pid,
});

object!(Pid { pid: i64 });

object!(User { id: String, name: String });

object!(Id { id: String });

object!(End { address: String, ip: String, port: i64, domain: String, bytes: i64, packets: i64 });

object!(Network {
    direction: &'static str,
    transport: String,
    iana_number: String,
    r#type: &'static str,
    bytes: i64,
    packets: i64,
});

object!(Dns { r#type: &'static str, question: Question, resolved_ip: Vec<String> });

object!(Question { name: String, r#type: String });

object!(Http { request: HttpRequest, response: HttpResponse });

object!(HttpRequest { method: String, bytes: i64 });

object!(HttpResponse { status_code: i64, bytes: i64 });

object!(Url { scheme: String, domain: String, path: String });

object!(Rule { name: String });

object!(ErrorFields { code: String, message: String });

object!(GenAi { operation: Name, tool: Name });

object!(Name { name: String });

object!(Related { ip: Vec<String>, hosts: Vec<String>, user: Vec<String> });
