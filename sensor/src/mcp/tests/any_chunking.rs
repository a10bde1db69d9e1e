//! What comes out does not depend on how the bytes were cut.

use proptest::prelude::*;

use super::*;

#[derive(Clone)]
enum Item {
    Line(Sender, Vec<u8>),
    Gap(Sender),
}

impl std::fmt::Debug for Item {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        match self {
            Self::Line(sender, line) => write!(f, "{sender:?}: {}", line.escape_ascii()),
            Self::Gap(sender) => write!(f, "{sender:?}: gap"),
        }
    }
}

fn sender() -> impl Strategy<Value = Sender> {
    prop_oneof![Just(Sender::Client), Just(Sender::Server)]
}

fn text() -> BoxedStrategy<String> {
    prop_oneof![
        "[a-z/\"\\\\é€😀\n\u{1}]{0,12}",
        Just("\\".repeat(33)),
        // Longer than a piece, with characters across its end.
        (16_380..16_390_usize).prop_map(|n| "a".repeat(n) + "é€😀" + "b"),
    ]
    .boxed()
}

fn id() -> BoxedStrategy<String> {
    prop_oneof![Just("0"), Just("1"), Just("\"1\""), Just("1.0"), Just("1e0"), Just("-1"), Just("null")]
        .prop_map(str::to_owned)
        .boxed()
}

fn message() -> BoxedStrategy<String> {
    let method = prop_oneof![
        Just("tools/call"),
        Just("tools/list"),
        Just("ping"),
        Just("initialize"),
        Just("notifications/progress"),
        Just("notifications/cancelled"),
        Just("session/new"),
    ];
    let request = (method, proptest::option::of(id()), text(), id()).prop_map(|(method, id, text, token)| {
        let text = serde_json::Value::from(text);
        let id = id.map_or(String::new(), |id| format!(r#","id":{id}"#));
        format!(
            r#"{{"jsonrpc":"2.0","method":"{method}","params":{{"name":"n","_meta":{{"progressToken":{token}}},"progressToken":{token},"requestId":{token},"arguments":{{"x":{text}}}}}{id}}}"#
        )
    });
    let answer = (id(), text(), any::<bool>()).prop_map(|(id, text, fails)| {
        let text = serde_json::Value::from(text);
        format!(
            r#"{{"result":{{"content":[{{"text":{text}}}],"tools":[{{"name":"t","description":{text}}}],"isError":{fails}}},"jsonrpc":"2.0","id":{id}}}"#
        )
    });
    let error = id()
        .prop_map(|id| format!(r#"{{"jsonrpc":"2.0","error":{{"code":-32601,"message":"x"}},"id":{id}}}"#));
    let session = prop_oneof![Just(INITIALIZE.to_owned()), Just(INITIALIZED.to_owned())];
    prop_oneof![4 => request, 4 => answer, 1 => error, 1 => session].boxed()
}

fn line() -> BoxedStrategy<Vec<u8>> {
    prop_oneof![
        10 => message().prop_map(String::into_bytes),
        2 => proptest::collection::vec(prop_oneof![9 => message(), 1 => Just("[1]".to_owned())], 0..4)
            .prop_map(|batch| format!("[{}]", batch.join(" , ")).into_bytes()),
        1 => Just(b"  ".to_vec()),
        1 => Just(br#"{"level":"info"}"#.to_vec()),
        1 => Just(br#"{"a":[}"#.to_vec()),
        1 => "[a-z{}\"\\[\\]]{1,20}".prop_map(String::into_bytes),
        1 => Just("[".repeat(200).into_bytes()),
        1 => Just(vec![b'x'; 1500]),
        // Cut short, changed in one byte: escapes and characters break too.
        2 => (message(), any::<prop::sample::Index>(), any::<u8>()).prop_map(|(message, at, byte)| {
            let mut bytes = message.into_bytes();
            let at = at.index(bytes.len());
            bytes[at] = if byte == b'\n' { b' ' } else { byte };
            bytes
        }),
        1 => (message(), any::<prop::sample::Index>()).prop_map(|(message, at)| {
            let mut bytes = message.into_bytes();
            bytes.truncate(at.index(bytes.len()));
            bytes
        }),
    ]
    .boxed()
}

fn items() -> impl Strategy<Value = Vec<Item>> {
    let ended = (line(), any::<bool>()).prop_map(|(mut line, carriage)| {
        line.extend_from_slice(if carriage { b"\r\n" } else { b"\n" });
        line
    });
    let item = prop_oneof![
        20 => (sender(), ended).prop_map(|(sender, line)| Item::Line(sender, line)),
        // A message that goes on behind the next line of the other side, or a gap.
        2 => (sender(), line()).prop_map(|(sender, line)| Item::Line(sender, line)),
        1 => sender().prop_map(Item::Gap),
    ];
    proptest::collection::vec(item, 0..14)
}

fn play(items: &[Item], candidate: bool, cut: &mut dyn FnMut(usize) -> usize) -> Talk {
    let mut talk = Talk::new(candidate);
    for item in items {
        match item {
            Item::Gap(sender) => talk.connection.gap(*sender, 0, 5, &mut talk.shown, &mut talk.out),
            Item::Line(sender, line) => {
                let mut rest = line.as_slice();
                while !rest.is_empty() {
                    let (now, later) = rest.split_at(cut(rest.len()).clamp(1, rest.len()));
                    talk.connection.bytes(*sender, 0, now, &mut talk.shown, &mut talk.out);
                    rest = later;
                }
            }
        }
    }
    talk.close();
    talk
}

proptest! {
    #[test]
    fn gives_what_whole_lines_give(
        items in items(),
        candidate in any::<bool>(),
        sizes in proptest::collection::vec(prop_oneof![1..4_usize, 1..64_usize, 1..20_000_usize], 1..20),
    ) {
        let whole = play(&items, candidate, &mut |len| len);
        let mut sizes = sizes.iter().cycle();
        let cut = play(&items, candidate, &mut |_| *sizes.next().unwrap());
        prop_assert_eq!(&whole.out, &cut.out);
        let moved: usize = items.iter().map(|item| if let Item::Line(_, line) = item { line.len() } else { 0 }).sum();
        let unread: u64 = whole.out.iter().map(|output| match output {
            Output::Uninspected { bytes, .. } => *bytes,
            _ => 0,
        }).sum();
        prop_assert!(unread <= moved as u64);
        prop_assert_eq!(whole.connection.counters(), cut.connection.counters());
        if let Some(at) = whole.out.iter().position(|output| *output == Output::NotMcp) {
            // The rest of the bytes at hand may have been shown, to no end.
            prop_assert_eq!(at + 1, whole.out.len());
        } else {
            prop_assert_eq!(&whole.shown.values, &cut.shown.values);
            prop_assert_eq!(&whole.shown.messages, &cut.shown.messages);
        }
    }

    /// What one message leaves behind must not colour the next.
    #[test]
    fn a_line_never_poisons_the_next(line in line(), sender in sender()) {
        let mut talk = Talk::new(false);
        talk.says(sender, &line).says(sender, "\n");
        talk.out.clear();
        talk.says(Sender::Server, "\n").client(CALL).server(FAILED);
        prop_assert!(talk.ends().ends_with(&[("tools/call", "echo", Outcome::ToolError)]));
    }
}
