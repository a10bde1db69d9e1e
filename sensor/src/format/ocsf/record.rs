//! Classes and objects of OCSF 1.8.0, as far as events need them. Names, types
//! and meanings are the schema's (schema.ocsf.io/1.8.0); the tests hold them to it.

use serde_json::Value;

/// A number and the caption that stands beside it.
pub type Captioned = (u32, &'static str);

pub struct Class {
    pub uid: u32,
    pub name: &'static str,
    pub category: Captioned,
}

const SYSTEM: Captioned = (1, "System Activity");
const FINDINGS: Captioned = (2, "Findings");
const IDENTITY: Captioned = (3, "Identity & Access Management");
const NETWORK: Captioned = (4, "Network Activity");
const APPLICATION: Captioned = (6, "Application Activity");

const fn class(uid: u32, name: &'static str, category: Captioned) -> Class {
    Class { uid, name, category }
}

pub const BASE_EVENT: Class = class(0, "Base Event", (0, "Uncategorized"));
pub const KERNEL_ACTIVITY: Class = class(1003, "Kernel Activity", SYSTEM);
pub const PROCESS_ACTIVITY: Class = class(1007, "Process Activity", SYSTEM);
pub const EVENT_LOG_ACTIVITY: Class = class(1008, "Event Log Activity", SYSTEM);
pub const DETECTION_FINDING: Class = class(2004, "Detection Finding", FINDINGS);
pub const ENTITY_MANAGEMENT: Class = class(3004, "Entity Management", IDENTITY);
pub const NETWORK_ACTIVITY: Class = class(4001, "Network Activity", NETWORK);
pub const HTTP_ACTIVITY: Class = class(4002, "HTTP Activity", NETWORK);
pub const DNS_ACTIVITY: Class = class(4003, "DNS Activity", NETWORK);
pub const APPLICATION_LIFECYCLE: Class = class(6002, "Application Lifecycle", APPLICATION);
pub const API_ACTIVITY: Class = class(6003, "API Activity", APPLICATION);

/// What the schema has no number for; the name is the source's own.
pub const OTHER: u32 = 99;

pub const UNKNOWN: Captioned = (0, "Unknown");

pub const SUCCESS: Captioned = (1, "Success");
pub const FAILURE: Captioned = (2, "Failure");
/// Of a finding.
pub const NEW: Captioned = (1, "New");

pub const INFORMATIONAL: Captioned = (1, "Informational");
pub const LOW: Captioned = (2, "Low");
pub const MEDIUM: Captioned = (3, "Medium");
pub const HIGH: Captioned = (4, "High");
pub const CRITICAL: Captioned = (5, "Critical");

/// `action_id` and the `disposition_id` that goes with it.
pub type Control = (Captioned, Captioned);
pub const ALLOWED: Control = ((1, "Allowed"), (1, "Allowed"));
pub const BLOCKED: Control = ((2, "Denied"), (2, "Blocked"));
pub const ISOLATED: Control = ((2, "Denied"), (4, "Isolated"));
pub const DETECTED: Control = ((3, "Observed"), (15, "Detected"));
pub const ALERT: Control = ((3, "Observed"), (19, "Alert"));

object!(
    /// An event of any class.
    Record {
        activity_id: u32,
        activity_name: String,
        category_uid: u32,
        category_name: &'static str,
        class_uid: u32,
        class_name: &'static str,
        type_uid: u64,
        type_name: String,
        severity_id: u32,
        severity: &'static str,
        time: i64,
        message: String,
        metadata: Metadata,
        status_id: u32,
        status: String,
        status_code: String,
        status_detail: String,
        action_id: u32,
        action: &'static str,
        disposition_id: u32,
        disposition: &'static str,
        is_alert: bool,
        firewall_rule: Named,
        policy: Policy,
        count: i64,
        duration: i64,
        start_time: i64,
        end_time: i64,
        actor: Actor,
        device: Device,
        process: Process,
        launch_type_id: u32,
        launch_type: &'static str,
        kernel: Kernel,
        src_endpoint: Endpoint,
        dst_endpoint: Endpoint,
        connection_info: ConnectionInfo,
        traffic: Traffic,
        query: DnsQuery,
        answers: Vec<DnsAnswer>,
        http_request: HttpRequest,
        http_response: HttpResponse,
        api: Api,
        message_context: MessageContext,
        resources: Vec<Resource>,
        finding_info: FindingInfo,
        evidences: Vec<Evidence>,
        entity: ManagedEntity,
        entity_result: ManagedEntity,
        app: Product,
        log_name: &'static str,
        log_provider: &'static str,
        unmapped: Value,
    }
);

object!(Metadata {
    version: &'static str,
    product: Product,
    profiles: Vec<&'static str>,
    uid: String,
    sequence: u64,
    event_code: &'static str,
    log_provider: &'static str,
});

object!(Product { name: String, uid: String, vendor_name: &'static str, version: String });

object!(
    /// `firewall_rule`, `service`, `application`, `container`.
    Named { name: String, uid: String }
);

object!(Policy { uid: String, version: String });

object!(Actor { app_name: String, app_uid: String, process: Process, user: User });

object!(User { name: String, uid: String });

object!(Process { pid: i64, name: String, cmd_line: String, file: File, user: User, container: Named });

object!(File { name: String, path: String, type_id: u32, r#type: &'static str });

object!(Device { uid: String, hostname: String, type_id: u32, r#type: &'static str, os: Os });

object!(Os { name: &'static str, type_id: u32, r#type: &'static str, kernel_release: String });

object!(Kernel { name: &'static str, type_id: u32, r#type: &'static str, system_call: &'static str });

impl Kernel {
    pub(super) fn of_call(call: &'static str) -> Kernel {
        Kernel { name: Some(call), type_id: Some(2), r#type: Some("System Call"), system_call: Some(call) }
    }
}

object!(Endpoint {
    ip: String,
    port: u16,
    hostname: String,
    name: String,
    svc_name: String,
    instance_uid: String,
});

object!(ConnectionInfo {
    uid: String,
    direction_id: u32,
    direction: &'static str,
    protocol_name: String,
    protocol_num: i64,
    protocol_ver_id: u32,
    protocol_ver: &'static str,
});

object!(Traffic {
    bytes: i64,
    bytes_in: i64,
    bytes_out: i64,
    packets: i64,
    packets_in: i64,
    packets_out: i64,
});

object!(DnsQuery { hostname: String, r#type: String });

object!(DnsAnswer { rdata: String, r#type: String });

object!(HttpRequest { http_method: String, url: Url, length: i64, http_headers: Vec<Header> });

object!(HttpResponse { code: i64, length: i64 });

object!(Url { hostname: String, path: String });

object!(Header { name: &'static str, value: String });

object!(Api { operation: String, version: String, service: Named, request: Request, response: Response });

object!(Request { uid: String });

object!(Response { code: i64 });

object!(MessageContext {
    uid: String,
    ai_role_id: u32,
    ai_role: &'static str,
    application: Named,
    service: Named,
});

object!(Resource { name: String, uid: String, r#type: &'static str, data: Value });

object!(FindingInfo {
    uid: String,
    title: String,
    desc: String,
    types: Vec<String>,
    created_time: i64,
    analytic: Analytic,
});

object!(Analytic { name: String, type_id: u32, r#type: &'static str });

object!(Evidence { actor: Actor, api: Api, data: Value });

object!(ManagedEntity {
    name: String,
    uid: String,
    version: String,
    type_id: u32,
    r#type: &'static str,
});
