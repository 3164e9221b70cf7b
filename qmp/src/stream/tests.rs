use super::*;

/// All items of `chunks`, read one after the other.
fn cut<'a>(chunks: impl IntoIterator<Item = &'a [u8]>) -> Vec<Item> {
    let mut splitter = Splitter::new();
    let mut items = Vec::new();
    for mut chunk in chunks {
        while !chunk.is_empty() {
            let (used, item) = splitter.read(chunk);
            assert!(used > 0, "no progress");
            chunk = &chunk[used..];
            items.extend(item);
        }
        assert!(splitter.message.capacity() <= 2 * MAX_MESSAGE);
    }
    items
}

fn texts(input: &[u8]) -> Vec<String> {
    let text = |item| match item {
        Item::Object(bytes) => String::from_utf8(bytes).unwrap(),
        Item::Malformed(wrong) => wrong,
    };
    cut([input]).into_iter().map(text).collect()
}

const TALK: &[u8] = br#"{"execute":"qmp_capabilities"}
{"execute":"stop","id":"}{\"\\"}{"execute":"cont","arguments":{"a":[1,-2.5e3,{"b":[]},true,null]}}

 	{ "execute" : "x" ,
  "id" : [ ] }  nonsense
{"bad":}{"execute":"quit"}"#;

#[test]
fn a_conversation_is_the_same_wherever_it_is_split() {
    let whole = cut([TALK]);
    let objects = whole.iter().filter(|item| matches!(item, Item::Object(..))).count();
    assert_eq!((objects, whole.len()), (5, 7));
    for at in 0..TALK.len() {
        assert_eq!(cut([&TALK[..at], &TALK[at..]]), whole, "split at {at}");
    }
    assert_eq!(cut(TALK.chunks(1)), whole, "byte by byte");
    for size in 2..TALK.len() {
        assert_eq!(cut(TALK.chunks(size)), whole, "in pieces of {size}");
    }
}

#[test]
fn a_byte_that_json_never_has_begins_afresh_whatever_is_open() {
    for open in [
        &b"{\"execute\":"[..],
        b"{\"execute\": {\"a\":[",
        b"{\"execute\":\"sto",
        b"{\"a\":\"\\",
        b"{!{",
    ] {
        for byte in [0xff, 0xfe, 1, 0x1f] {
            let texts = texts(&[open, &[byte], b"{\"execute\":\"query-status\"}\n"].concat());
            assert_eq!(texts.len(), 2, "{open:?}, {byte:#x}: {texts:?}");
            assert!(texts[0].starts_with("JSON parse error"), "{texts:?}");
            assert_eq!(texts[1], "{\"execute\":\"query-status\"}");
        }
    }
}

#[test]
fn whatever_serde_reads_as_an_object_is_passed_whole() {
    for text in [
        r#"{}"#,
        r#"{"a":"\"}\\"}"#,
        r#"{"a":[[],{},[{}],"]"],"b":-0,"c":1E+9}"#,
        "{\r\n\t\"a\" : [ 1 , 2 ]\n}",
        r#"{"a":"é😀"}"#,
    ] {
        serde_json::from_str::<serde_json::Value>(text).unwrap();
        assert_eq!(texts(text.as_bytes()), [text]);
    }
}

#[test]
fn a_mistake_is_reported_once_and_the_next_line_is_read() {
    let good = r#"{"execute":"stop"}"#;
    for (bad, expected) in [
        ("nonsense", "expecting an object, got 'n'"),
        ("[1,2]", "expecting an object, got '['"),
        ("}}}]]]", "expecting an object, got '}'"),
        ("\"text\"", "expecting an object, got '\"'"),
        ("\0\0", "expecting an object, got byte 0x00"),
        ("\u{feff}", "expecting an object, got byte 0xef"),
        ("{\"a\"}", "expecting ':', got '}'"),
        ("{a:1}", "expecting a key in double quotes, got 'a'"),
        ("{'a':1}", "expecting a key in double quotes, got '''"),
        ("{\"a\":1,}", "expecting a key in double quotes, got '}'"),
        ("{\"a\":[1,]}", "expecting a value, got ']'"),
        ("{\"a\":[1}}", "expecting ',' or ']', got '}'"),
        ("{\"a\":1]", "expecting ',' or '}', got ']'"),
        ("{\"a\" \"b\"}", "expecting ':', got '\"'"),
        ("{\"a\":\"\u{1}\"}", "control character 0x01 in a string"),
        ("{\"a\":\"never ends", "control character 0x0a in a string"),
        ("{\"a\":{{{{", "expecting a key in double quotes, got '{'"),
    ] {
        let expected = format!("JSON parse error, {expected}");
        assert_eq!(texts(format!("{bad}\n{good}\n").as_bytes()), [&expected, good], "{bad:?}");
    }
}

#[test]
fn a_line_that_was_not_finished_costs_the_next_one_only() {
    let expected =
        texts(b"{\"execute\":\"stop\"\n{\"execute\":\"stop\"}\n{\"execute\":\"cont\"}\n");
    assert_eq!(
        expected,
        ["JSON parse error, expecting ',' or '}', got '{'", r#"{"execute":"cont"}"#]
    );
}

#[test]
fn nothing_inside_a_broken_message_is_taken_for_a_command() {
    let expected = texts(br#"{"execute":"x"; "arguments":{"execute":"quit"}}{"execute":"cont"}"#);
    assert_eq!(expected.len(), 2);
    assert_eq!(expected[1], r#"{"execute":"cont"}"#);
}

#[test]
fn a_million_open_brackets_are_refused_at_the_65th() {
    for open in [&b"["[..], br#"{"a":"#, br#"[{"unknown":"#] {
        let mut input = br#"{"unknown":"#.to_vec();
        input.extend(open.repeat(1_000_000));
        input.extend(b"\n{}");
        assert_eq!(texts(&input), ["JSON parse error, nested deeper than 64 levels", "{}"]);
    }
    let deepest = format!("{{\"a\":{}{}}}", "[".repeat(63), "]".repeat(63));
    assert_eq!(texts(deepest.as_bytes()), [deepest]);
}

#[test]
fn a_line_of_64_mib_stays_bounded() {
    let line = vec![b'x'; 1 << 20];
    let begin = &br#"{"execute":""#[..];
    // `cut` checks the memory after each piece.
    let pieces = [begin].into_iter().chain(std::iter::repeat_n(&line[..], 64));
    let items = cut(pieces.chain([&b"\"}{}"[..]]));
    assert_eq!(
        items[0],
        Item::Malformed("JSON parse error, a message is longer than 1048576 bytes".into())
    );
    assert!(matches!(&items[1], Item::Object(text) if text == b"{}"));
    assert_eq!(items.len(), 2);
}

#[test]
fn the_longest_message_passes() {
    let longest = format!("{{\"a\":\"{}\"}}", "x".repeat(MAX_MESSAGE - 8));
    assert_eq!(longest.len(), MAX_MESSAGE);
    assert_eq!(texts(longest.as_bytes()), [longest]);
}

/// Random bytes, mostly structural: after any input, the third line from there is understood (the
/// first may complete what was open, the second breaks it).
#[test]
fn rubbish_never_wedges_the_stream() {
    let alphabet = br#"{}[]:,"\ 	1eE.-tfn{"a":1}"#;
    let mut seed = 0x9e37_79b9_u32;
    let mut next = || {
        seed ^= seed << 13;
        seed ^= seed >> 17;
        seed ^= seed << 5;
        seed
    };
    for _ in 0..5_000 {
        let length = next() % 60;
        let mut input: Vec<u8> =
            (0..length).map(|_| alphabet[next() as usize % alphabet.len()]).collect();
        for line in ["first", "second", "third"] {
            input.extend(format!("\n{{\"execute\":\"{line}\"}}").bytes());
        }
        let last = texts(&input).pop().unwrap();
        assert_eq!(last, r#"{"execute":"third"}"#, "{}", input.escape_ascii());
    }
}
