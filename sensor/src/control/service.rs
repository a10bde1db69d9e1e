//! The service on the control socket: admission, then the agent.

use super::connection::{Caller, ControlConnection, Limits, Places};
use super::socket::ControlSocket;
use super::{Agent, ControlError, Peer};
use crate::event::{Body, Event, decision, exchange, json, pb, server};
use crate::grpc::{reflection_v1, reflection_v1alpha};
use crate::health;
use pb::control_server::{Control, ControlServer};
use std::future::Future;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::net::UnixListener;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::codec::CompressionEncoding;
use tonic::service::InterceptorLayer;
use tonic::transport::Server;
use tonic::{Code, Request, Response, Status};

/// Requests are small; only `argv` of Launch has some length.
const MAX_REQUEST: usize = 256 << 10;
/// Of an error: it travels in a header, and clients limit those.
const MAX_MESSAGE: usize = 4096;
/// Events in one message.
const CHUNK: usize = 256;
/// Learned names in one message.
const NAMES: usize = 512;
/// Buffer of one reader of events, of each class.
const READER: usize = 4096;
/// That are as healthy as the agent.
const SERVICES: [&str; 1] = ["mcp_sensor.v1.Control"];
const REFUSED: &str = "an MCP server may not talk to the sensor";
/// How long open calls may go on after the signal to end.
const DRAIN: Duration = Duration::from_secs(2);

/// Serves until `shutdown`, then closes the socket.
pub async fn serve(
    socket: ControlSocket,
    agent: Arc<dyn Agent>,
    limits: Limits,
    shutdown: impl Future<Output = ()> + Send,
) -> anyhow::Result<()> {
    let listener = UnixListener::from_std(socket.listener()?)?;
    let gate = Arc::new(Gate { agent: agent.clone(), refusals: Refusals::default() });
    let (connections, incoming) = mpsc::channel::<std::io::Result<ControlConnection>>(1);
    let (health, health_service) = tonic_health::server::health_reporter();
    let following = tokio::spawn(health::tell(health, SERVICES.to_vec(), agent.health()).await);
    let at_request = gate.clone();
    let (end, ending) = watch::channel(false);
    let service = Service { agent, readers: AtomicU64::new(0).into(), ending: ending.clone() };
    let control = ControlServer::new(service)
        .max_decoding_message_size(MAX_REQUEST)
        .accept_compressed(CompressionEncoding::Gzip)
        .send_compressed(CompressionEncoding::Gzip);
    let router = Server::builder()
        .layer(InterceptorLayer::new(move |request| at_request.admit(request)))
        .max_concurrent_streams(16)
        .http2_max_header_list_size(16 << 10)
        .http2_keepalive_interval(Some(Duration::from_secs(30)))
        .http2_keepalive_timeout(Some(Duration::from_secs(10)))
        .add_service(control)
        .add_service(health_service.accept_compressed(CompressionEncoding::Gzip))
        .add_service(reflection_v1()?)
        .add_service(reflection_v1alpha()?);
    let accepting = accept(listener, gate, Places::new(limits), connections);
    let mut serving =
        Box::pin(router.serve_with_incoming_shutdown(ReceiverStream::new(incoming), ended(ending)));
    tokio::select! {
        served = &mut serving => return Ok(served?),
        () = accepting => (),
        () = shutdown => (),
    }
    following.abort();
    let _ = end.send(true);
    // Accepting has ended with the select; calls that are open get a moment.
    match tokio::time::timeout(DRAIN, serving).await {
        Ok(served) => served?,
        Err(_) => tracing::debug!("calls were still open on the control socket"),
    }
    Ok(())
}

async fn ended(mut ending: watch::Receiver<bool>) {
    // An error: the sender is gone, which is the end too.
    let _ = ending.wait_for(|end| *end).await;
}

async fn accept(
    listener: UnixListener,
    gate: Arc<Gate>,
    places: Arc<Places>,
    connections: mpsc::Sender<std::io::Result<ControlConnection>>,
) {
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of descriptors or memory: both pass.
                tracing::warn!(%error, "a control connection could not be accepted");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let peer = match Peer::of(stream.as_fd()) {
            Ok(peer) => Arc::new(peer),
            Err(error) => {
                tracing::debug!(%error, "a control connection was closed");
                continue;
            }
        };
        let refused = gate.agent.is_labelled(peer.pid);
        let Some(place) = places.take(peer.uid, refused) else {
            tracing::debug!(pid = peer.pid, uid = peer.uid, refused, "no place for a control connection");
            continue;
        };
        if connections.send(Ok(places.connection(stream, Caller { peer, refused }, place))).await.is_err() {
            return;
        }
    }
}

/// Who is let in, on every request of every service.
struct Gate {
    agent: Arc<dyn Agent>,
    refusals: Refusals,
}

impl Gate {
    fn admit(&self, request: Request<()>) -> Result<Request<()>, Status> {
        let caller = request.extensions().get::<Caller>().ok_or_else(|| Status::internal("no caller"))?;
        let peer = &caller.peer;
        // The label first: were the process gone, the pid could be another's.
        let labelled = caller.refused || self.agent.is_labelled(peer.pid);
        if !peer.is_alive() {
            return Err(Status::permission_denied("the process that opened this connection is gone"));
        }
        if labelled {
            self.refusals.report(&*self.agent, peer);
            return Err(Status::permission_denied(REFUSED));
        }
        Ok(request)
    }
}

/// Refusals become findings, one a second at most; each says how many.
#[derive(Default)]
struct Refusals {
    state: Mutex<(Option<Instant>, u64)>,
}

impl Refusals {
    fn report(&self, agent: &dyn Agent, peer: &Peer) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.1 += 1;
        if state.0.is_some_and(|last| last.elapsed() < Duration::from_secs(1)) {
            return;
        }
        let count = std::mem::take(&mut state.1);
        state.0 = Some(Instant::now());
        drop(state);
        agent.bus().publish_now(Body::Finding(pb::Finding {
            kind: "control_refused".to_owned(),
            severity: pb::Severity::Medium.into(),
            detail: format!(
                "a labelled process (pid {}, uid {}) called the control socket; {count} calls since the last report",
                peer.pid, peer.uid
            ),
            ..Default::default()
        }));
    }
}

struct Service {
    agent: Arc<dyn Agent>,
    readers: Arc<AtomicU64>,
    ending: watch::Receiver<bool>,
}

impl From<ControlError> for Status {
    fn from(error: ControlError) -> Status {
        let code = match &error {
            ControlError::NotFound(_) => Code::NotFound,
            ControlError::Invalid(_) => Code::InvalidArgument,
            ControlError::Refused(_) => Code::PermissionDenied,
            ControlError::Unavailable(_) => Code::FailedPrecondition,
            ControlError::Exhausted(_) => Code::ResourceExhausted,
            ControlError::Internal(_) => Code::Internal,
        };
        let mut text = error.to_string();
        if text.len() > MAX_MESSAGE {
            text.truncate(text.floor_char_boundary(MAX_MESSAGE));
            text.push('…');
        }
        Status::new(code, text)
    }
}

fn caller<T>(request: &Request<T>) -> Result<Arc<Peer>, Status> {
    let caller = request.extensions().get::<Caller>().ok_or_else(|| Status::internal("no caller"))?;
    Ok(caller.peer.clone())
}

fn root_only<T>(request: &Request<T>, what: &str) -> Result<(), Status> {
    if caller(request)?.uid == 0 {
        return Ok(());
    }
    Err(Status::permission_denied(format!("{what} needs root")))
}

/// Which events a reader asked for.
fn wanted(request: &pb::EventsRequest) -> impl Fn(&Event) -> bool + Send + Sync + 'static {
    let (name, since) = (request.server.clone(), request.since_unix_ns);
    let verdicts: Vec<pb::Verdict> = request.verdicts().collect();
    let types = request.types.clone();
    let tools = request.tools.clone();
    let outcomes: Vec<pb::Outcome> = request.outcomes().collect();
    let called = move |body: &Body| matches!(body, Body::ToolCall(t) if tools.contains(&t.tool));
    let any_tool = request.tools.is_empty();
    move |event| {
        let Some(body) = &event.body else { return false };
        event.time_unix_ns >= since
            && (name.is_empty() || server(body) == name)
            && (verdicts.is_empty() || decision(body).is_some_and(|d| verdicts.contains(&d.verdict())))
            && (any_tool || called(body))
            && (outcomes.is_empty() || exchange(body).is_some_and(|e| outcomes.contains(&e.outcome())))
            && (types.is_empty() || types.iter().any(|t| t == json::type_name(body)))
    }
}

fn message(events: &[Arc<Event>]) -> pb::EventsResponse {
    pb::EventsResponse { events: events.iter().map(|e| (**e).clone()).collect() }
}

#[tonic::async_trait]
impl Control for Service {
    async fn status(&self, _: Request<pb::StatusRequest>) -> Result<Response<pb::StatusResponse>, Status> {
        let mut status = self.agent.status().await?;
        let bus = self.agent.bus();
        status.sensor.clone_from(&bus.identity().sensor);
        status.boot.clone_from(&bus.identity().boot);
        status.events = bus.last_seq();
        status.subscribers = bus.subscribers();
        let health = self.agent.health().borrow().clone();
        status.health = Some(pb::HealthState { not_live: health.not_live, not_ready: health.not_ready });
        Ok(Response::new(status))
    }

    async fn servers(
        &self,
        request: Request<pb::ServersRequest>,
    ) -> Result<Response<pb::ServersResponse>, Status> {
        let name = &request.get_ref().server;
        let servers = self.agent.servers((!name.is_empty()).then_some(name)).await?;
        Ok(Response::new(pb::ServersResponse { servers }))
    }

    type NamesStream = ReceiverStream<Result<pb::NamesResponse, Status>>;

    async fn names(&self, request: Request<pb::NamesRequest>) -> Result<Response<Self::NamesStream>, Status> {
        let server = &request.get_ref().server;
        let mut names = self.agent.names((!server.is_empty()).then_some(server)).await?.into_iter();
        // A client that does not read is ended with its connection.
        let (to_client, stream) = mpsc::channel(2);
        tokio::spawn(async move {
            loop {
                let names: Vec<pb::LearnedName> = names.by_ref().take(NAMES).collect();
                if names.is_empty() || to_client.send(Ok(pb::NamesResponse { names })).await.is_err() {
                    return;
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    type ToolsStream = ReceiverStream<Result<pb::ToolsResponse, Status>>;

    async fn tools(&self, request: Request<pb::ToolsRequest>) -> Result<Response<Self::ToolsStream>, Status> {
        let server = &request.get_ref().server;
        let servers = self.agent.tools((!server.is_empty()).then_some(server)).await?;
        let (to_client, stream) = mpsc::channel(2);
        tokio::spawn(async move {
            for server in servers {
                if to_client.send(Ok(pb::ToolsResponse { server: Some(server) })).await.is_err() {
                    return;
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    type EventsStream = ReceiverStream<Result<pb::EventsResponse, Status>>;

    async fn events(
        &self,
        request: Request<pb::EventsRequest>,
    ) -> Result<Response<Self::EventsStream>, Status> {
        let peer = caller(&request)?;
        let request = request.into_inner();
        if let Some(unknown) = request.types.iter().find(|t| !json::TYPES.contains(&t.as_str())) {
            let known = json::TYPES.join(", ");
            return Err(Status::invalid_argument(format!("no event type {unknown:?}; there are {known}")));
        }
        let filter = wanted(&request);
        let bus = self.agent.bus();
        let (mut past, follow) = if request.follow {
            let name = format!("events-{}-{}", peer.pid, self.readers.fetch_add(1, Ordering::Relaxed));
            let (past, reader) = bus
                .subscribe_with_history(&name, READER, filter)
                .map_err(|e| Status::resource_exhausted(e.to_string()))?;
            (past, Some(reader))
        } else {
            (bus.history(filter), None)
        };
        let limit = usize::try_from(request.limit).unwrap_or(usize::MAX);
        if limit > 0 && past.len() > limit {
            past.drain(..past.len() - limit);
        }
        // A client that does not read holds two messages and one buffer.
        let (to_client, stream) = mpsc::channel(2);
        let (agent, ending) = (self.agent.clone(), self.ending.clone());
        tokio::spawn(async move {
            for events in past.chunks(CHUNK) {
                if to_client.send(Ok(message(events))).await.is_err() {
                    return;
                }
            }
            drop(past);
            let Some(mut reader) = follow else { return };
            let mut events = Vec::with_capacity(CHUNK);
            let mut ending = Box::pin(ended(ending));
            loop {
                let more = tokio::select! {
                    biased;
                    more = reader.recv(&mut events, CHUNK) => more,
                    () = to_client.closed() => return,
                    () = &mut ending => return,
                };
                // The caller may have been labelled, or have ended, since.
                if agent.is_labelled(peer.pid) || !peer.is_alive() {
                    let _ = to_client.send(Err(Status::permission_denied(REFUSED))).await;
                    return;
                }
                if !more || to_client.send(Ok(message(&events))).await.is_err() {
                    return;
                }
                events.clear();
            }
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn policy_show(
        &self,
        _: Request<pb::PolicyShowRequest>,
    ) -> Result<Response<pb::PolicyShowResponse>, Status> {
        Ok(Response::new(self.agent.policy().await?))
    }

    async fn policy_reload(
        &self,
        request: Request<pb::PolicyReloadRequest>,
    ) -> Result<Response<pb::PolicyReloadResponse>, Status> {
        root_only(&request, "loading the policy")?;
        Ok(Response::new(self.agent.reload().await?))
    }

    async fn set_mode(
        &self,
        request: Request<pb::SetModeRequest>,
    ) -> Result<Response<pb::SetModeResponse>, Status> {
        root_only(&request, "switching a server's mode")?;
        let request = request.into_inner();
        let mode = request.mode();
        if mode == pb::Mode::Unspecified {
            return Err(Status::invalid_argument("no mode given: audit or enforce"));
        }
        let previous = self.agent.set_mode(&request.server, mode).await?;
        Ok(Response::new(pb::SetModeResponse { previous: previous.into() }))
    }

    async fn launch(
        &self,
        request: Request<pb::LaunchRequest>,
    ) -> Result<Response<pb::LaunchResponse>, Status> {
        let peer = caller(&request)?;
        let request = request.into_inner();
        if request.server.is_empty() {
            return Err(Status::invalid_argument("no server given"));
        }
        Ok(Response::new(self.agent.launch(&peer, &request.server, &request.argv).await?))
    }
}
