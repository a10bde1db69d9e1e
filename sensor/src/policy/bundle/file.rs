//! The bundle as bytes: read, verified, made.

use super::key::{KeyError, PublicKeys, SigningKey};
use mcp_sensor_proto::v1 as pb;
use prost::Message as _;
use sha2::{Digest as _, Sha256};

/// Largest bundle with its signature: it travels as one message.
pub const MAX_BYTES: usize = 3 << 20;
/// Files in one.
const MAX_FILES: usize = 256;
/// Longest name of a file or of a group.
const MAX_NAME: usize = 128;
/// In front of what is signed, so that the key's signatures mean nothing else.
const CONTEXT: &[u8] = b"mcp-sensor policy bundle v1\0";
const KEY_ID: usize = 8;
const SIGNATURE: usize = 64;

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BundleError {
    #[error("{0} bytes; at most {MAX_BYTES}")]
    TooLarge(usize),
    #[error("not a policy bundle: {0}")]
    Malformed(&'static str),
    #[error("it was signed with the key {id}, which is not pinned; pinned are {pinned}")]
    UnknownKey { id: String, pinned: String },
    #[error("the signature is not that of the key {0}: it was changed after it was signed")]
    Signature(String),
    #[error(transparent)]
    Key(#[from] KeyError),
}

/// A bundle that is well formed. Whether it may be believed is for
/// [`Bundle::verify`] to say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bundle {
    /// As it came.
    pub signed: Vec<u8>,
    pub version: u64,
    pub created_unix_ns: i64,
    /// Empty: for every sensor.
    pub group: String,
    pub allow_rollback: bool,
    pub delegate: bool,
    /// SHA-256 of what is signed, hex.
    pub hash: String,
    files: Vec<pb::PolicyFile>,
    key_id: Vec<u8>,
    content: Vec<u8>,
    signature: Vec<u8>,
}

/// What is to be signed.
#[derive(Clone, Debug, Default)]
pub struct Draft {
    pub version: u64,
    pub created_unix_ns: i64,
    pub group: String,
    pub allow_rollback: bool,
    pub delegate: bool,
    /// Names and contents, the policy first.
    pub files: Vec<(String, Vec<u8>)>,
}

impl Bundle {
    /// Nothing is believed yet. Only the one encoding of a bundle is taken, so
    /// that one with fields of a later version is not.
    pub fn parse(bytes: &[u8]) -> Result<Bundle, BundleError> {
        if bytes.len() > MAX_BYTES {
            return Err(BundleError::TooLarge(bytes.len()));
        }
        let malformed = |_| BundleError::Malformed("it cannot be decoded");
        let signed = pb::SignedPolicyBundle::decode(bytes).map_err(malformed)?;
        if signed.signature.len() != SIGNATURE {
            return Err(BundleError::Malformed("no Ed25519 signature"));
        }
        let said = pb::PolicyBundle::decode(&*signed.bundle).map_err(malformed)?;
        if signed.encode_to_vec() != bytes || said.encode_to_vec() != signed.bundle {
            return Err(BundleError::Malformed(
                "it holds something that this version of mcp-sensor does not know",
            ));
        }
        check(&said).map_err(BundleError::Malformed)?;
        Ok(Bundle {
            signed: bytes.to_vec(),
            version: said.version,
            created_unix_ns: said.created_unix_ns,
            group: said.group,
            allow_rollback: said.allow_rollback,
            delegate: said.delegate,
            hash: hex::encode(Sha256::digest(&signed.bundle)),
            files: said.files,
            key_id: said.key_id,
            content: signed.bundle,
            signature: signed.signature,
        })
    }

    pub fn verify(&self, keys: &PublicKeys) -> Result<(), BundleError> {
        let id = hex::encode(&self.key_id);
        let Some(key) = keys.find(&self.key_id) else {
            return Err(BundleError::UnknownKey { id, pinned: keys.ids() });
        };
        if key.verify(&message(&self.content), &self.signature) {
            Ok(())
        } else {
            Err(BundleError::Signature(id))
        }
    }

    pub fn key_id(&self) -> String {
        hex::encode(&self.key_id)
    }

    /// Name and content of the policy.
    pub fn policy(&self) -> (&str, &[u8]) {
        self.files.first().map_or(("", &[]), |file| (&file.name, &file.content))
    }

    /// A file that the policy refers to. No other is read, whatever its name.
    pub fn file(&self, name: &str) -> Option<&[u8]> {
        let name = plain(name);
        self.files.iter().skip(1).find(|file| plain(&file.name) == name).map(|file| file.content.as_slice())
    }

    pub fn files(&self) -> impl Iterator<Item = (&str, usize)> {
        self.files.iter().map(|file| (file.name.as_str(), file.content.len()))
    }
}

impl Draft {
    pub fn sign(self, key: &SigningKey) -> Result<Bundle, BundleError> {
        let file = |(name, content)| pb::PolicyFile { name, content };
        let bundle = pb::PolicyBundle {
            version: self.version,
            created_unix_ns: self.created_unix_ns,
            group: self.group,
            allow_rollback: self.allow_rollback,
            delegate: self.delegate,
            files: self.files.into_iter().map(file).collect(),
            key_id: key.public()?.id().to_vec(),
        };
        let bundle = bundle.encode_to_vec();
        let signature = key.sign(&message(&bundle))?;
        Bundle::parse(&pb::SignedPolicyBundle { bundle, signature }.encode_to_vec())
    }
}

fn message(content: &[u8]) -> Vec<u8> {
    [CONTEXT, content].concat()
}

fn plain(name: &str) -> &str {
    name.strip_prefix("./").unwrap_or(name)
}

fn check(said: &pb::PolicyBundle) -> Result<(), &'static str> {
    if said.version == 0 {
        return Err("its version is 0");
    }
    if said.key_id.len() != KEY_ID {
        return Err("it does not say which key signed it");
    }
    if !said.group.is_empty() && !is_group(&said.group) {
        return Err("its group is 1 to 128 printable ASCII characters without spaces");
    }
    if said.files.is_empty() {
        return Err("no policy in it");
    }
    if said.files.len() > MAX_FILES {
        return Err("more than 256 files");
    }
    for (n, file) in said.files.iter().enumerate() {
        let good = !file.name.is_empty()
            && file.name.len() <= MAX_NAME
            && !file.name.chars().any(char::is_control)
            && !file.name.starts_with('/')
            && plain(&file.name).split('/').all(|part| !matches!(part, "" | "." | ".."));
        if !good {
            return Err("the name of a file is no path below the policy's directory");
        }
        if said.files[..n].iter().any(|other| plain(&other.name) == plain(&file.name)) {
            return Err("two files have one name");
        }
    }
    Ok(())
}

/// Whether a group of sensors may be called that.
pub fn is_group(name: &str) -> bool {
    !name.is_empty() && name.len() <= MAX_NAME && name.chars().all(|c| c.is_ascii_graphic())
}
