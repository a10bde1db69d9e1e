use proptest::prelude::*;
use serde_json::json;

use crate::{
    inspect::{Key, Limits, PLACE_BYTES, Scanner, redact, redact_json, redact_place},
    mcp::{Sender, Values as _},
};

fn token() -> String {
    format!("{}_{}", "ghp", "0A1b2C3d4E5f6G7h8I9j0K1l2M3n4O5p6Q7r")
}

fn found(text: &str) -> usize {
    let mut scanner = Scanner::new(Key::new(&[7; 32]), Limits::default());
    scanner.piece("", text, true);
    scanner.message(Sender::Client, "", "");
    scanner.take().len()
}

#[test]
fn secrets_and_personal_data_are_named_in_their_place() {
    let text = format!("use {} of someone@example.com, card 4111 1111 1111 1111.", token());
    assert_eq!(redact(&text), "use [REDACTED:github-pat] of [email], card [payment_card].");
}

#[test]
fn a_secret_found_by_its_name_goes_everywhere() {
    let secret = "0123456789abcdef0123456789abcdef01234567";
    let text = format!("datadog_key = \"{secret}\"\nlater: {secret}");
    let redacted = redact(&text);
    assert!(!redacted.contains(secret), "{redacted}");
    assert_eq!(redacted.matches("[REDACTED:datadog-access-token]").count(), 2);
}

#[test]
fn what_is_harmless_stays() {
    for text in ["", "Plain text, key words and token counts: 42.", "{\"a\": [1, 2, 3]}", "é漢🦀"] {
        assert_eq!(redact(text), text);
    }
}

#[test]
fn strings_of_json_are_redacted_with_their_names() {
    let mut value = json!({
        "arguments": {"DATADOG_API_KEY": "0123456789abcdef0123456789abcdef01234567", "n": 1, "list": [token(), null]},
        "someone@example.com": true,
    });
    redact_json(&mut value);
    assert_eq!(
        value,
        json!({
            "arguments": {"DATADOG_API_KEY": "[REDACTED:datadog-access-token]", "n": 1, "list": ["[REDACTED:github-pat]", null]},
            "[email]": true,
        })
    );
}

#[test]
fn text_beyond_what_is_kept_is_cut() {
    assert_eq!(redact(&"x".repeat(2 << 20)).len(), 1 << 20);
}

fn fragment() -> impl Strategy<Value = String> {
    prop_oneof![
        Just(token()),
        Just("a".to_owned()),
        Just(format!("{}{}", "AKIA", "Q3EGRXEAMPLEKEY7")),
        Just("api_key = k3J9x0Qw7Zt5Lm2Vb8Ny4".to_owned()),
        Just("datadog: '0123456789abcdef0123456789abcdef01234567'".to_owned()),
        Just("0123456789abcdef0123456789abcdef01234567".to_owned()),
        Just("4111 1111 1111 1111".to_owned()),
        Just("someone@example.com".to_owned()),
        Just("token=".to_owned()),
        Just("🦀".to_owned()),
        "[ -~\n]{0,12}",
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn nothing_that_is_found_survives(parts in prop::collection::vec(fragment(), 0..12)) {
        let text = parts.concat();
        let redacted = redact(&text);
        prop_assert_eq!(found(&redacted), 0, "{}", redacted);
        prop_assert_eq!(&redact(&redacted), &redacted);
        if found(&text) == 0 {
            prop_assert_eq!(redacted, text);
        }
    }
}

#[test]
fn names_that_are_secrets_do_not_stand_in_places() {
    let token = format!("ghp_{}", "a1B2c3D4e5F6".repeat(3));
    let place = redact_place(&format!("/params/arguments/{token}/a~1b"));
    assert_eq!(place, "/params/arguments/[REDACTED:github-pat]/a~1b");
    // Escapes do not hide what they stand in.
    let place = redact_place("/params/https:~1~1user:aVerySecret42Word@host.example~1x");
    assert!(!place.contains("aVerySecret42Word"), "{place}");
    assert_eq!(redact_place("/params/arguments/text"), "/params/arguments/text");
    let cut = redact_place(&format!("/params/{}{token}", "x".repeat(PLACE_BYTES - 20)));
    assert_eq!(cut, "/params/…");
}
