//! Ed25519 keys (RFC 8032, RFC 8410) in PEM files.

use rcgen::{KeyPair, PKCS_ED25519, SigningKey as _};
use ring::signature::{ED25519, UnparsedPublicKey};
use rustls::pki_types::SubjectPublicKeyInfoDer;
use rustls::pki_types::pem::PemObject;
use sha2::{Digest as _, Sha256};
use std::fmt;

/// Of an Ed25519 key: all but the 32 bytes of the key itself.
const SPKI: [u8; 12] = [0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];
/// Keys in one file.
const MAX_KEYS: usize = 64;

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    #[error("no Ed25519 key in it (PEM, PUBLIC KEY)")]
    NoPublic,
    #[error("more than {MAX_KEYS} keys")]
    TooMany,
    #[error("no Ed25519 private key in it (PEM, PKCS#8): {0}")]
    Private(String),
    #[error("the key cannot sign: {0}")]
    Sign(String),
}

#[derive(Clone, PartialEq, Eq)]
pub struct PublicKey([u8; 32]);

impl PublicKey {
    /// First 8 bytes of its SHA-256.
    pub fn id(&self) -> [u8; 8] {
        let mut id = [0; 8];
        id.copy_from_slice(&Sha256::digest(self.0)[..8]);
        id
    }

    pub fn verify(&self, message: &[u8], signature: &[u8]) -> bool {
        UnparsedPublicKey::new(&ED25519, self.0).verify(message, signature).is_ok()
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.id()))
    }
}

/// Those that are trusted: any one of them may have signed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PublicKeys(Vec<PublicKey>);

impl PublicKeys {
    /// Every `PUBLIC KEY` of a PEM file; each must be Ed25519.
    pub fn read_pem(pem: &[u8]) -> Result<PublicKeys, KeyError> {
        let mut keys = Vec::new();
        for der in SubjectPublicKeyInfoDer::pem_slice_iter(pem) {
            let der = der.map_err(|_| KeyError::NoPublic)?;
            let key = der.as_ref().strip_prefix(&SPKI).and_then(|raw| raw.try_into().ok());
            keys.push(PublicKey(key.ok_or(KeyError::NoPublic)?));
            if keys.len() > MAX_KEYS {
                return Err(KeyError::TooMany);
            }
        }
        if keys.is_empty() { Err(KeyError::NoPublic) } else { Ok(PublicKeys(keys)) }
    }

    pub fn extend(&mut self, more: PublicKeys) {
        self.0.extend(more.0);
    }

    pub fn find(&self, id: &[u8]) -> Option<&PublicKey> {
        self.0.iter().find(|key| key.id() == id)
    }

    /// For people.
    pub fn ids(&self) -> String {
        self.0.iter().map(|key| hex::encode(key.id())).collect::<Vec<_>>().join(", ")
    }
}

pub struct SigningKey(KeyPair);

impl SigningKey {
    pub fn generate() -> Result<SigningKey, KeyError> {
        KeyPair::generate_for(&PKCS_ED25519).map(SigningKey).map_err(|e| KeyError::Private(e.to_string()))
    }

    pub fn read_pem(pem: &str) -> Result<SigningKey, KeyError> {
        KeyPair::from_pem_and_sign_algo(pem, &PKCS_ED25519)
            .map(SigningKey)
            .map_err(|e| KeyError::Private(e.to_string()))
    }

    /// PKCS#8.
    pub fn to_pem(&self) -> String {
        self.0.serialize_pem()
    }

    pub fn public_pem(&self) -> String {
        self.0.public_key_pem()
    }

    pub fn public(&self) -> Result<PublicKey, KeyError> {
        self.0.public_key_raw().try_into().map(PublicKey).map_err(|_| KeyError::NoPublic)
    }

    pub fn sign(&self, message: &[u8]) -> Result<Vec<u8>, KeyError> {
        self.0.sign(message).map_err(|e| KeyError::Sign(e.to_string()))
    }
}
