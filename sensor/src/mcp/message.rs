//! What is kept of one JSON-RPC message, and where in it that stands.

use super::{Implementation, ListedTool};

/// Longest `params.uri` that is kept; other names are cut at [`MAX_TEXT`].
pub(super) const MAX_URI: usize = 1024;
pub(super) const MAX_TEXT: usize = 256;

/// Keyed hash of a JSON-RPC id, a progress token: with its type.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Id {
    #[default]
    Absent,
    /// `null`, or no string and no number.
    Null,
    Of(u64),
}

impl Id {
    pub(super) const fn known(self) -> Option<u64> {
        match self {
            Self::Of(hash) => Some(hash),
            Self::Absent | Self::Null => None,
        }
    }
}

#[derive(Clone, Debug, Default, PartialEq)]
pub(super) enum Version {
    #[default]
    Absent,
    Text(String),
    /// A number: the Agent Client Protocol.
    Other,
}

#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Params {
    pub(super) name: String,
    pub(super) uri: String,
    pub(super) cursor: bool,
    pub(super) request: Id,
    pub(super) progress: Id,
    pub(super) version: Version,
    pub(super) client: Option<Implementation>,
    /// `capabilities` is an object; its hash unless that was too large.
    pub(super) capabilities: Option<Option<[u8; 32]>>,
    pub(super) meta: ParamsMeta,
}

#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct ParamsMeta {
    pub(super) progress: Id,
    pub(super) version: Version,
    pub(super) client: Option<Implementation>,
    pub(super) capabilities: Option<Option<[u8; 32]>>,
}

#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Reply {
    pub(super) version: Version,
    pub(super) server: Option<Implementation>,
    pub(super) meta_server: Option<Implementation>,
    pub(super) capabilities: bool,
    pub(super) is_error: bool,
    pub(super) kind: String,
    pub(super) task: bool,
    pub(super) tools: Option<Tools>,
    pub(super) cursor: bool,
}

#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Tools {
    pub(super) tools: Vec<ListedTool>,
    pub(super) spent: usize,
    pub(super) cut: bool,
}

/// What a message comes to.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Facts {
    /// `"jsonrpc": "2.0"`.
    pub(super) rpc: bool,
    pub(super) id: Id,
    pub(super) method: Option<String>,
    pub(super) params: Params,
    pub(super) result: Option<Reply>,
    /// The error's code.
    pub(super) error: Option<i64>,
}

/// Places in a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// A message, or the batch that it stands in.
    Root,
    Message,
    JsonRpc,
    Id,
    Method,
    Params,
    Result,
    Error,
    Code,
    Name,
    Uri,
    Cursor,
    RequestId,
    ProgressToken,
    ProtocolVersion,
    Capabilities,
    ParamsMeta,
    MetaProgressToken,
    MetaProtocolVersion,
    MetaCapabilities,
    ResultVersion,
    ResultCapabilities,
    IsError,
    ResultType,
    Task,
    Tools,
    Tool,
    NextCursor,
    ResultMeta,
    Info(Who),
    InfoName(Who),
    InfoVersion(Who),
    Other,
}

/// Whose `Implementation` it is, and where it said so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Who {
    Client,
    MetaClient,
    Server,
    MetaServer,
}

impl Place {
    /// Where the value of a member of the object here stands.
    pub(super) fn member(self, name: &str) -> Self {
        match (self, name) {
            (Self::Message, "jsonrpc") => Self::JsonRpc,
            (Self::Message, "id") => Self::Id,
            (Self::Message, "method") => Self::Method,
            (Self::Message, "params") => Self::Params,
            (Self::Message, "result") => Self::Result,
            (Self::Message, "error") => Self::Error,
            (Self::Error, "code") => Self::Code,
            (Self::Params, "name") => Self::Name,
            (Self::Params, "uri") => Self::Uri,
            (Self::Params, "cursor") => Self::Cursor,
            (Self::Params, "requestId") => Self::RequestId,
            (Self::Params, "progressToken") => Self::ProgressToken,
            (Self::Params, "protocolVersion") => Self::ProtocolVersion,
            (Self::Params, "capabilities") => Self::Capabilities,
            (Self::Params, "clientInfo") => Self::Info(Who::Client),
            (Self::Params, "_meta") => Self::ParamsMeta,
            (Self::ParamsMeta, "progressToken") => Self::MetaProgressToken,
            (Self::ParamsMeta, "io.modelcontextprotocol/protocolVersion") => Self::MetaProtocolVersion,
            (Self::ParamsMeta, "io.modelcontextprotocol/clientCapabilities") => Self::MetaCapabilities,
            (Self::ParamsMeta, "io.modelcontextprotocol/clientInfo") => Self::Info(Who::MetaClient),
            (Self::Result, "protocolVersion") => Self::ResultVersion,
            (Self::Result, "capabilities") => Self::ResultCapabilities,
            (Self::Result, "isError") => Self::IsError,
            (Self::Result, "resultType") => Self::ResultType,
            (Self::Result, "task") => Self::Task,
            (Self::Result, "tools") => Self::Tools,
            (Self::Result, "nextCursor") => Self::NextCursor,
            (Self::Result, "serverInfo") => Self::Info(Who::Server),
            (Self::Result, "_meta") => Self::ResultMeta,
            (Self::ResultMeta, "io.modelcontextprotocol/serverInfo") => Self::Info(Who::MetaServer),
            (Self::Info(who), "name") => Self::InfoName(who),
            (Self::Info(who), "version") => Self::InfoVersion(who),
            _ => Self::Other,
        }
    }

    /// Most bytes of a string here that are kept.
    pub(super) const fn keeps(self) -> usize {
        match self {
            Self::JsonRpc
            | Self::Method
            | Self::Name
            | Self::ProtocolVersion
            | Self::MetaProtocolVersion
            | Self::ResultVersion
            | Self::ResultType
            | Self::InfoName(_)
            | Self::InfoVersion(_) => MAX_TEXT,
            Self::Uri => MAX_URI,
            _ => 0,
        }
    }

    /// Numbers here have a meaning.
    pub(super) const fn counts(self) -> bool {
        self.is_id() || matches!(self, Self::Code | Self::ProtocolVersion)
    }

    pub(super) const fn is_id(self) -> bool {
        matches!(self, Self::Id | Self::RequestId | Self::ProgressToken | Self::MetaProgressToken)
    }
}

impl Facts {
    fn reply(&mut self) -> &mut Reply {
        self.result.get_or_insert_default()
    }

    fn info(&mut self, who: Who) -> &mut Option<Implementation> {
        match who {
            Who::Client => &mut self.params.client,
            Who::MetaClient => &mut self.params.meta.client,
            Who::Server => &mut self.reply().server,
            Who::MetaServer => &mut self.reply().meta_server,
        }
    }

    /// A value begins here: one of the same name before it no longer counts.
    pub(super) fn clear(&mut self, place: Place) {
        match place {
            Place::JsonRpc => self.rpc = false,
            Place::Method => self.method = None,
            Place::Params => self.params = Params::default(),
            Place::Result => self.result = Some(Reply::default()),
            Place::Error | Place::Code => self.error = Some(0),
            Place::Name => self.params.name.clear(),
            Place::Uri => self.params.uri.clear(),
            Place::Cursor => self.params.cursor = false,
            Place::ProtocolVersion => self.params.version = Version::Absent,
            Place::Capabilities => self.params.capabilities = None,
            Place::ParamsMeta => self.params.meta = ParamsMeta::default(),
            Place::MetaProtocolVersion => self.params.meta.version = Version::Absent,
            Place::MetaCapabilities => self.params.meta.capabilities = None,
            Place::ResultVersion => self.reply().version = Version::Absent,
            Place::ResultCapabilities => self.reply().capabilities = false,
            Place::IsError => self.reply().is_error = false,
            Place::ResultType => self.reply().kind.clear(),
            Place::Task => self.reply().task = false,
            Place::Tools => self.reply().tools = None,
            Place::NextCursor => self.reply().cursor = false,
            Place::ResultMeta => self.reply().meta_server = None,
            Place::Info(who) => *self.info(who) = None,
            Place::InfoName(who) => self.info(who).get_or_insert_default().name.clear(),
            Place::InfoVersion(who) => self.info(who).get_or_insert_default().version.clear(),
            Place::Id | Place::RequestId | Place::ProgressToken | Place::MetaProgressToken => {
                self.identify(place, Id::Null);
            }
            Place::Root | Place::Message | Place::Tool | Place::Other => {}
        }
    }

    /// An object begins here.
    pub(super) fn object(&mut self, place: Place) {
        match place {
            Place::Info(who) => *self.info(who) = Some(Implementation::default()),
            Place::ResultCapabilities => self.reply().capabilities = true,
            Place::Task => self.reply().task = true,
            _ => {}
        }
    }

    /// A string ended here; `text` is its beginning, as much as is kept.
    pub(super) fn string(&mut self, place: Place, text: &str) {
        let owned = || text.to_owned();
        match place {
            Place::JsonRpc => self.rpc = text == "2.0",
            Place::Method => self.method = Some(owned()),
            Place::Name => self.params.name = owned(),
            Place::Uri => self.params.uri = owned(),
            Place::Cursor => self.params.cursor = true,
            Place::ProtocolVersion => self.params.version = Version::Text(owned()),
            Place::MetaProtocolVersion => self.params.meta.version = Version::Text(owned()),
            Place::ResultVersion => self.reply().version = Version::Text(owned()),
            Place::ResultType => self.reply().kind = owned(),
            Place::NextCursor => self.reply().cursor = true,
            Place::InfoName(who) => self.info(who).get_or_insert_default().name = owned(),
            Place::InfoVersion(who) => self.info(who).get_or_insert_default().version = owned(),
            _ => {}
        }
    }

    pub(super) fn number(&mut self, place: Place, text: &str) {
        match place {
            Place::Code => self.error = Some(integer(text).unwrap_or(0)),
            Place::ProtocolVersion => self.params.version = Version::Other,
            _ => {}
        }
    }

    pub(super) fn null(&mut self, place: Place) {
        if place == Place::Error {
            self.error = None;
        }
    }

    /// Something in the list of tools is not kept.
    pub(super) fn cut_tools(&mut self) {
        if let Some(tools) = self.result.as_mut().and_then(|result| result.tools.as_mut()) {
            tools.cut = true;
        }
    }

    pub(super) fn boolean(&mut self, place: Place, truth: bool) {
        if place == Place::IsError {
            self.reply().is_error = truth;
        }
    }

    pub(super) fn identify(&mut self, place: Place, id: Id) {
        match place {
            Place::Id => self.id = id,
            Place::RequestId => self.params.request = id,
            Place::ProgressToken => self.params.progress = id,
            Place::MetaProgressToken => self.params.meta.progress = id,
            _ => {}
        }
    }
}

/// The integer that a number's text means: 100 for `100`, `1e2` and `100.0`, as
/// receivers that know only doubles see it.
pub(super) fn integer(text: &str) -> Option<i64> {
    /// Doubles are exact up to here.
    const EXACT: f64 = 9_007_199_254_740_992.0;
    text.parse().ok().or_else(|| {
        let number: f64 = text.parse().ok()?;
        (number.fract() == 0.0 && number.abs() < EXACT).then_some(number as i64)
    })
}
