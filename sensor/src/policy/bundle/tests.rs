use super::*;
use mcp_sensor_proto::v1 as pb;
use proptest::prelude::*;
use prost::Message as _;
use std::sync::LazyLock;

static KEY: LazyLock<SigningKey> = LazyLock::new(|| SigningKey::generate().unwrap());

fn keys(key: &SigningKey) -> PublicKeys {
    PublicKeys::read_pem(key.public_pem().as_bytes()).unwrap()
}

fn draft() -> Draft {
    Draft {
        version: 7,
        created_unix_ns: 1,
        group: "web".to_owned(),
        files: vec![
            ("policy.yaml".to_owned(), b"version: 1\n".to_vec()),
            ("./th/a.json".to_owned(), b"{}".to_vec()),
        ],
        ..Draft::default()
    }
}

#[test]
fn what_is_signed_is_what_is_read() {
    let bundle = draft().sign(&KEY).unwrap();
    bundle.verify(&keys(&KEY)).unwrap();
    assert_eq!((bundle.version, bundle.group.as_str(), bundle.delegate), (7, "web", false));
    assert_eq!(bundle.policy(), ("policy.yaml", &b"version: 1\n"[..]));
    assert_eq!(bundle.file("th/a.json"), Some(&b"{}"[..]));
    assert_eq!(bundle.file("policy.yaml"), None, "the policy does not refer to itself");
    assert_eq!(Bundle::parse(&bundle.signed).unwrap(), bundle);
}

#[test]
fn keys_survive_their_files_and_others_do_not_verify() {
    let again = SigningKey::read_pem(&KEY.to_pem()).unwrap();
    let bundle = draft().sign(&again).unwrap();
    let other = SigningKey::generate().unwrap();
    assert!(matches!(bundle.verify(&keys(&other)), Err(BundleError::UnknownKey { .. })));
    let mut both = keys(&other);
    both.extend(keys(&KEY));
    bundle.verify(&both).unwrap();
    let file = [other.public_pem(), KEY.public_pem()].concat();
    bundle.verify(&PublicKeys::read_pem(file.as_bytes()).unwrap()).unwrap();
    assert_eq!(PublicKeys::read_pem(b""), Err(KeyError::NoPublic));
    assert_eq!(PublicKeys::read_pem(KEY.to_pem().as_bytes()), Err(KeyError::NoPublic));
    let rsa = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
    assert_eq!(PublicKeys::read_pem(rsa.public_key_pem().as_bytes()), Err(KeyError::NoPublic));
    assert!(SigningKey::read_pem(&rsa.serialize_pem()).is_err());
}

#[test]
fn what_cannot_be_a_bundle_is_not_made() {
    let refused = |change: fn(&mut Draft)| {
        let mut draft = draft();
        change(&mut draft);
        draft.sign(&KEY).unwrap_err().to_string()
    };
    assert!(refused(|d| d.version = 0).contains("version is 0"));
    assert!(refused(|d| d.files.clear()).contains("no policy"));
    assert!(refused(|d| d.group = "a b".to_owned()).contains("group"));
    for name in ["", "/etc/passwd", "../x", "a/../b", "a//b", "a\nb"] {
        let files = vec![(name.to_owned(), Vec::new())];
        let error = Draft { files, ..draft() }.sign(&KEY).unwrap_err();
        assert!(error.to_string().contains("name of a file"), "{name:?}: {error}");
    }
    assert!(refused(|d| d.files.push(("policy.yaml".to_owned(), Vec::new()))).contains("one name"));
    assert!(refused(|d| d.files[0].1 = vec![b'#'; MAX_BYTES]).contains("at most"));
}

#[test]
fn a_field_of_a_later_version_is_refused() {
    let bundle = draft().sign(&KEY).unwrap();
    let signed = pb::SignedPolicyBundle::decode(&*bundle.signed).unwrap();
    // Field 90, varint 1.
    let more = [&signed.bundle[..], &[0xd0, 0x05, 0x01]].concat();
    let inner = pb::SignedPolicyBundle { bundle: more, ..signed }.encode_to_vec();
    let outer = [&bundle.signed[..], &[0xd0, 0x05, 0x01]].concat();
    for bytes in [inner, outer] {
        assert!(Bundle::parse(&bytes).unwrap_err().to_string().contains("does not know"));
    }
}

proptest! {
    #[test]
    fn any_bytes_are_read_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        let _ = Bundle::parse(&bytes);
    }

    /// Wherever a byte is changed, cut or added.
    #[test]
    fn nothing_that_was_changed_verifies(at in any::<prop::sample::Index>(), bits in 1u8.., cut in any::<bool>()) {
        let bundle = draft().sign(&KEY).unwrap();
        let mut bytes = bundle.signed;
        let at = at.index(bytes.len());
        if cut {
            bytes.truncate(at);
        } else {
            bytes[at] ^= bits;
        }
        let believed = Bundle::parse(&bytes).is_ok_and(|b| b.verify(&keys(&KEY)).is_ok());
        prop_assert!(!believed);
    }

    #[test]
    fn contents_come_through_as_they_are(content in proptest::collection::vec(any::<u8>(), 0..2000), version in 1u64.., delegate: bool, rollback: bool) {
        let files = vec![("p.yaml".to_owned(), content.clone())];
        let draft = Draft { version, delegate, allow_rollback: rollback, files, ..draft() };
        let bundle = draft.sign(&KEY).unwrap();
        let read = Bundle::parse(&bundle.signed).unwrap();
        prop_assert_eq!(read.policy().1, &content[..]);
        prop_assert_eq!((read.version, read.delegate, read.allow_rollback), (version, delegate, rollback));
    }
}
