//! A receiver of OTLP that takes everything apart and answers as it is told to.

use opentelemetry_proto::tonic::collector::logs::v1::logs_service_server::{LogsService, LogsServiceServer};
use opentelemetry_proto::tonic::collector::logs::v1::{
    ExportLogsPartialSuccess, ExportLogsServiceRequest, ExportLogsServiceResponse,
};
use opentelemetry_proto::tonic::collector::metrics::v1::metrics_service_server::{
    MetricsService, MetricsServiceServer,
};
use opentelemetry_proto::tonic::collector::metrics::v1::{
    ExportMetricsServiceRequest, ExportMetricsServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::any_value::Value as Any;
use opentelemetry_proto::tonic::common::v1::{AnyValue, KeyValue};
use opentelemetry_proto::tonic::logs::v1::LogRecord;
use serde_json::{Map, Value};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::codec::CompressionEncoding;
use tonic::transport::{Server, ServerTlsConfig};
use tonic::{Request, Response, Status};

/// A log record, with the attributes of its resource among its own.
#[derive(Clone, Debug)]
pub struct Record {
    pub id: String,
    pub record: LogRecord,
    pub attributes: Map<String, Value>,
}

/// What to answer to these records: how many are rejected, or an error.
pub type Answer = Box<dyn FnMut(&[Record]) -> Result<i64, Status> + Send>;

#[derive(Default)]
pub struct Got {
    /// Of requests that were answered well.
    pub records: Vec<Record>,
    pub requests: u64,
    pub refused: u64,
    pub encodings: Vec<String>,
    pub authorization: Vec<String>,
    pub metrics: Vec<ExportMetricsServiceRequest>,
}

#[derive(Clone)]
struct Service {
    got: Arc<Mutex<Got>>,
    answer: Arc<Mutex<Answer>>,
}

pub struct Receiver {
    pub address: SocketAddr,
    pub got: Arc<Mutex<Got>>,
    _end: oneshot::Sender<()>,
}

pub struct Options {
    pub gzip: bool,
    pub tls: Option<ServerTlsConfig>,
    pub answer: Answer,
}

impl Default for Options {
    fn default() -> Options {
        Options { gzip: true, tls: None, answer: Box::new(|_| Ok(0)) }
    }
}

pub async fn receive(options: Options) -> Receiver {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let got = Arc::new(Mutex::new(Got::default()));
    let service = Service { got: got.clone(), answer: Arc::new(Mutex::new(options.answer)) };
    let (mut logs, mut metrics) =
        (LogsServiceServer::new(service.clone()), MetricsServiceServer::new(service));
    if options.gzip {
        logs = logs.accept_compressed(CompressionEncoding::Gzip).send_compressed(CompressionEncoding::Gzip);
        metrics = metrics.accept_compressed(CompressionEncoding::Gzip);
    }
    let mut server = Server::builder();
    if let Some(tls) = options.tls {
        server = server.tls_config(tls).unwrap();
    }
    let (end, ended) = oneshot::channel::<()>();
    let serving = server.add_service(logs).add_service(metrics).serve_with_incoming_shutdown(
        TcpListenerStream::new(listener),
        async move {
            let _ = ended.await;
        },
    );
    tokio::spawn(serving);
    Receiver { address, got, _end: end }
}

fn to_json(value: &AnyValue) -> Value {
    match value.value.as_ref().expect("no value is empty") {
        Any::StringValue(text) => text.clone().into(),
        Any::BoolValue(yes) => (*yes).into(),
        Any::IntValue(number) => (*number).into(),
        Any::ArrayValue(list) => list.values.iter().map(to_json).collect(),
        Any::KvlistValue(fields) => Value::Object(object(&fields.values)),
        other => panic!("{other:?}"),
    }
}

pub fn object(fields: &[KeyValue]) -> Map<String, Value> {
    let map: Map<String, Value> =
        fields.iter().map(|f| (f.key.clone(), to_json(f.value.as_ref().unwrap()))).collect();
    assert_eq!(map.len(), fields.len(), "each key once: {fields:?}");
    map
}

fn records(request: &ExportLogsServiceRequest) -> Vec<Record> {
    let mut records = Vec::new();
    for resource in &request.resource_logs {
        let of_resource = object(&resource.resource.as_ref().unwrap().attributes);
        for scope in &resource.scope_logs {
            assert_eq!(scope.scope.as_ref().unwrap().name, "mcp-sensor");
            for record in &scope.log_records {
                let mut attributes = object(&record.attributes);
                let id =
                    attributes.get("log.record.uid").and_then(Value::as_str).unwrap_or_default().to_owned();
                attributes.extend(of_resource.clone());
                records.push(Record { id, record: record.clone(), attributes });
            }
        }
    }
    records
}

#[tonic::async_trait]
impl LogsService for Service {
    async fn export(
        &self,
        request: Request<ExportLogsServiceRequest>,
    ) -> Result<Response<ExportLogsServiceResponse>, Status> {
        let header = |name: &str| {
            let value = request.metadata().get(name).and_then(|v| v.to_str().ok());
            value.unwrap_or_default().to_owned()
        };
        let (encoding, authorization) = (header("grpc-encoding"), header("authorization"));
        let records = records(request.get_ref());
        let answer = (self.answer.lock().unwrap())(&records);
        let mut got = self.got.lock().unwrap();
        got.requests += 1;
        got.encodings.push(encoding);
        got.authorization.push(authorization);
        match answer {
            Ok(rejected) => {
                got.records.extend(records);
                let partial = ExportLogsPartialSuccess {
                    rejected_log_records: rejected,
                    error_message: if rejected > 0 { "no room".to_owned() } else { String::new() },
                };
                Ok(Response::new(ExportLogsServiceResponse {
                    partial_success: (rejected > 0).then_some(partial),
                }))
            }
            Err(status) => {
                got.refused += 1;
                Err(status)
            }
        }
    }
}

#[tonic::async_trait]
impl MetricsService for Service {
    async fn export(
        &self,
        request: Request<ExportMetricsServiceRequest>,
    ) -> Result<Response<ExportMetricsServiceResponse>, Status> {
        self.got.lock().unwrap().metrics.push(request.into_inner());
        Ok(Response::new(ExportMetricsServiceResponse::default()))
    }
}
