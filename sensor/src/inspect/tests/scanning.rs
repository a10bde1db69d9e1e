use proptest::prelude::*;

use crate::{
    inspect::{Found, Key, Kind, Limits, Scanner, Severity},
    mcp::{Sender, Values as _},
};

/// Made here, so that nobody's scanner finds them in this file.
fn token() -> String {
    format!("{}_{}", "ghp", "0A1b2C3d4E5f6G7h8I9j0K1l2M3n4O5p6Q7r")
}

fn private_key() -> String {
    let lines = "MIIEvQIBADANBgkqhkiG9w0BAQEFAASCBKcwggSjAgEAAoIBAQDf0\n".repeat(50);
    format!("-----BEGIN {kind}-----\n{lines}-----END {kind}-----", kind = "PRIVATE KEY")
}

fn scanner(limits: Limits) -> Scanner {
    Scanner::new(Key::new(&[7; 32]), limits)
}

fn end(scanner: &mut Scanner) -> Vec<Found> {
    scanner.message(Sender::Client, "tools/call", "x");
    scanner.take()
}

fn scan(place: &str, value: &str) -> Vec<Found> {
    let mut scanner = scanner(Limits::default());
    scanner.piece(place, value, true);
    let found = end(&mut scanner);
    assert_eq!((scanner.unscanned(), scanner.dropped()), (0, 0));
    found
}

fn rules(found: &[Found]) -> Vec<&'static str> {
    found.iter().map(|f| f.rule).collect()
}

#[test]
fn a_token_is_found_with_its_place_and_length() {
    let found = scan("/params/arguments/text", &format!("use {} now", token()));
    let [one] = &found[..] else { panic!("{found:?}") };
    assert_eq!(
        (one.rule, one.place.as_str(), one.length, one.count),
        ("github-pat", "/params/arguments/text", 40, 1)
    );
    assert_eq!((one.kind, one.severity), (Kind::Secret, Severity::High));
    assert_eq!(one.value_hash, Key::new(&[7; 32]).hash(token().as_bytes()));
    assert_ne!(one.value_hash, Key::new(&[8; 32]).hash(token().as_bytes()));
}

#[test]
fn the_name_of_a_member_is_what_a_rule_reads_before_the_value() {
    let value = "0123456789abcdef0123456789abcdef01234567";
    assert_eq!(rules(&scan("/params/arguments/env/DATADOG_API_KEY", value)), ["datadog-access-token"]);
    assert_eq!(rules(&scan("/params/arguments/commit", value)), [""; 0]);
    // An array's number is no name.
    assert_eq!(rules(&scan("/params/arguments/datadog_key/0", value)), ["datadog-access-token"]);
    // Secrets in the name itself belong to nobody's value.
    assert_eq!(rules(&scan(&format!("/params/arguments/{}", token()), "nothing here")), [""; 0]);
}

#[test]
fn a_specific_rule_is_preferred_to_a_generic_one() {
    let found = scan("/params/arguments/api_key", &token());
    assert_eq!(rules(&found), ["github-pat"]);
    let found = scan("/params/arguments/api_key", "k3J9x0Qw7Zt5Lm2Vb8Ny4");
    assert_eq!(rules(&found), ["generic-api-key"]);
    assert_eq!(found[0].severity, Severity::Low);
}

#[test]
fn what_gitleaks_allows_is_not_found() {
    // An allowlist of the rule, a stop word, too little entropy.
    assert_eq!(rules(&scan("/x/text", &format!("{}EXAMPLE", "AKIAIOSFODNN7"))), [""; 0]);
    assert_eq!(rules(&scan("/x/api_key", "my-example-key-xz12")), [""; 0]);
    assert_eq!(rules(&scan("/x/text", &format!("{}_{}", "ghp", "a".repeat(36)))), [""; 0]);
}

#[test]
fn a_secret_is_found_once_wherever_windows_meet() {
    const WINDOW: usize = 56 * 1024;
    for secret in [token(), private_key()] {
        for before in (WINDOW - 3 * secret.len()..WINDOW + 8).step_by(1 + secret.len() / 7) {
            let text = format!("{} {secret} {}", "x".repeat(before), "y".repeat(20_000));
            let found = scan("/x", &text);
            let [one] = &found[..] else { panic!("{before}: {found:?}") };
            assert_eq!((one.length, one.count), (secret.len() as u64, 1), "{before}");
        }
    }
}

#[test]
fn bytes_beyond_the_budget_are_counted() {
    let mut scanner = scanner(Limits { message_bytes: 100, ..Limits::default() });
    scanner.piece("/a", &"x".repeat(60), true);
    scanner.piece("/b", &format!("{} {}", "y".repeat(38), token()), true);
    scanner.piece("/c", &token(), true);
    assert_eq!(end(&mut scanner), []);
    assert_eq!(scanner.unscanned(), 60 + 39 + 40 + 40 - 100);
    // The next message has a budget of its own.
    scanner.piece("/c", &token(), true);
    assert_eq!(rules(&end(&mut scanner)), ["github-pat"]);
    assert_eq!(scanner.unscanned(), 0);
}

#[test]
fn a_secret_seen_again_is_reported_when_it_has_been_seen_ten_times_as_often() {
    let mut scanner = scanner(Limits::default());
    let mut counts = Vec::new();
    for _ in 0..120 {
        scanner.piece("/a", &token(), true);
        counts.extend(end(&mut scanner).iter().map(|f| f.count));
    }
    assert_eq!(counts, [1, 9, 90]);
    assert_eq!(scanner.finish().iter().map(|f| f.count).collect::<Vec<_>>(), [20]);
    assert_eq!(scanner.finish(), []);
}

#[test]
fn what_is_remembered_of_a_connection_is_bounded() {
    let mut scanner = scanner(Limits::default());
    let numbered =
        |n: usize| format!("{}_{}Zz9Y", "ghp", hex::encode(Key::new(&[1; 32]).hash(&n.to_le_bytes())));
    for n in 0..2000 {
        scanner.piece("/a", &numbered(n), true);
        end(&mut scanner);
    }
    let mut counts = 0;
    for _ in 0..2 {
        scanner.piece("/a", &numbered(0), true);
        counts += end(&mut scanner).len();
    }
    assert_eq!(counts, 1, "forgotten, found as new, known again");
}

#[test]
fn findings_of_a_message_are_bounded() {
    let mut scanner = scanner(Limits { message_findings: 3, ..Limits::default() });
    for n in 0..8 {
        scanner.piece("/a", &format!("{}_{n}A1b2C3d4E5f6G7h8I9j0K1l2M3n4O5p6Q7r", "ghp"), true);
    }
    scanner.piece("/a", "someone@example.com", true);
    assert_eq!(rules(&end(&mut scanner)), ["github-pat", "github-pat", "github-pat", "email"]);
    assert_eq!(scanner.dropped(), 5);
}

#[test]
fn personal_data_is_counted_by_class() {
    let found = scan("/x", "a@example.com, b@example.org; card 4111 1111 1111 1111, +1 415 555 0100");
    let counts: Vec<_> = found.iter().map(|f| (f.rule, f.count, f.severity)).collect();
    assert_eq!(
        counts,
        [("email", 2, Severity::Low), ("payment_card", 1, Severity::Low), ("phone", 1, Severity::Low)]
    );
}

#[test]
fn personal_data_is_known_by_its_form() {
    for (text, class) in [
        ("4111111111111111", "payment_card"),
        ("card: 5500-0055-5555-5559.", "payment_card"),
        ("3782 822463 10005", "payment_card"),
        ("30569309025904", "payment_card"),
        ("6011111111111117", "payment_card"),
        ("DE89 3704 0044 0532 0130 00", "iban"),
        ("GB82WEST12345698765432", "iban"),
        ("iban NL91ABNA0417164300,", "iban"),
        ("FR14 2004 1010 0505 0001 3M02 606", "iban"),
        ("MT84MALT011000012345MTLCAST001S", "iban"),
        ("078-05-1120", "us_ssn"),
        ("+14155550100", "phone"),
        ("tel +49 30 1234567", "phone"),
        ("first.last+tag@sub.example.co.uk", "email"),
        ("<mailto:a@b.io>", "email"),
    ] {
        assert_eq!(rules(&scan("/x", text)), [class], "{text}");
    }
}

#[test]
fn what_only_has_the_form_of_personal_data_is_not_found() {
    for text in [
        "4111111111111112",
        "1234567890123456",
        "0000000000000000",
        "4111111111111111111111",
        "id-4111111111111111",
        "0.4111111111111111",
        "DE89 3704 0044 0532 0130 01",
        "XX89370400440532013000",
        "000-12-3456",
        "666-12-3456",
        "900-12-3456",
        "123-00-4567",
        "1234-56-7890",
        "2026-11-21",
        "1763733048000",
        "2026-11-21T10:27:32.123456789Z",
        "+0000",
        "1+23456789012",
        "+12345",
        "3.14159265358979",
        "550e8400-e29b-41d4-a716-446655440000",
        "icon@2x.png",
        "git@github.com:org/repo.git",
        "npx @scope/pkg@1.2.3",
        "user@localhost",
        "https://token@example.com/",
    ] {
        assert_eq!(rules(&scan("/x", text)), [""; 0], "{text}");
    }
}

/// Each is made to be searched far; what was not is said.
#[test]
fn hostile_text_costs_bounded_work() {
    let mut limited = 0;
    for unit in [
        "curl ",
        "ey",
        "key=",
        "api_key = ",
        "facebook ",
        "-----BEGIN A PRIVATE KEY-----",
        "xoxb-1-",
        "a@",
        "+1 ",
        "DE89",
        "1 2-",
    ] {
        let mut scanner = scanner(Limits { message_bytes: 64 * 1024, ..Limits::default() });
        scanner.piece("/x", &unit.repeat((64 << 10) / unit.len()), true);
        end(&mut scanner);
        limited += u64::from(scanner.unscanned() > 0);
    }
    assert!(limited >= 1, "`curl` reads on for as long as it may");
}

fn fragment() -> impl Strategy<Value = String> {
    prop_oneof![
        Just(token()),
        Just(private_key()),
        Just("4111 1111 1111 1111".to_owned()),
        Just("DE89 3704 0044 0532 0130 00".to_owned()),
        Just("someone@example.com".to_owned()),
        Just("api_key = 'k3J9x0Qw7Zt5Lm2Vb8Ny4'".to_owned()),
        Just("curl -u user:hunter2secret https://example.com\n".to_owned()),
        Just("éß漢🦀\u{200d}".to_owned()),
        "[ -~\n]{0,40}",
        "[0-9 +-]{0,40}",
        (0usize..70_000).prop_map(|n| "word ".chars().cycle().take(n).collect()),
        (0usize..70_000).prop_map(|n| "0123456 ".chars().cycle().take(n).collect()),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn chunking_changes_nothing(
        values in prop::collection::vec((prop::collection::vec(fragment(), 0..6), "/[a-z]{1,8}/(key|text|0)"), 1..4),
        cuts in prop::collection::vec(0usize..200_000, 0..40),
        budget in prop_oneof![Just(1u64 << 20), 0u64..80_000],
    ) {
        let values: Vec<(String, String)> = values.into_iter().map(|(parts, place)| (parts.concat(), place)).collect();
        let limits = Limits { message_bytes: budget, ..Limits::default() };
        let mut whole = scanner(limits);
        let mut pieces = scanner(limits);
        for (value, place) in &values {
            whole.piece(place, value, true);
            let mut rest = value.as_str();
            for cut in &cuts {
                let (piece, after) = rest.split_at(rest.floor_char_boundary(cut % (rest.len() + 1)));
                pieces.piece(place, piece, false);
                rest = after;
            }
            pieces.piece(place, rest, true);
        }
        prop_assert_eq!(end(&mut whole), end(&mut pieces));
        prop_assert_eq!(whole.unscanned(), pieces.unscanned());
        prop_assert_eq!(whole.dropped(), pieces.dropped());
    }

    #[test]
    fn no_text_is_too_odd(text in any::<String>(), place in any::<String>()) {
        scan(&place, &text);
    }
}
