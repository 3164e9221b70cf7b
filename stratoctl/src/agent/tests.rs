//! Agents that follow the protocol, and guests that do not.
use std::{
    io::{BufRead, BufReader},
    thread,
};

use super::*;

/// Longer than anything here takes.
const LONG: Duration = Duration::from_secs(60);

/// The result of `ask` when `guest` is at the other end. It is given each line that it receives,
/// and the stream to answer on; it hangs up when it returns false.
fn with(guest: impl FnMut(&[u8], &mut UnixStream) -> bool + Send + 'static) -> Outcome {
    asked_for(Mode::Reboot, ANSWER_TIMEOUT, REFUSAL, guest)
}

fn asked_for(
    mode: Mode,
    hello: Duration,
    answer: Duration,
    mut guest: impl FnMut(&[u8], &mut UnixStream) -> bool + Send + 'static,
) -> Outcome {
    let (ours, theirs) = UnixStream::pair().expect("a pair");
    let far = thread::spawn(move || {
        let mut writer = theirs.try_clone().expect("a second handle");
        let mut heard = Vec::new();
        for line in BufReader::new(theirs).split(b'\n') {
            let Ok(line) = line else { break };
            heard.push(line);
            let last = heard.last().expect("a line").clone();
            if !guest(&last, &mut writer) {
                let _ = writer.shutdown(std::net::Shutdown::Both);
                break;
            }
        }
        heard
    });
    let result = ask_within(ours, mode, hello, answer);
    Outcome { result, heard: far.join().expect("the far side") }
}

struct Outcome {
    result: Result<(), AgentError>,
    heard: Vec<Vec<u8>>,
}

impl Outcome {
    /// The guest was not asked to shut down.
    fn assert_silent(self) {
        assert!(matches!(self.result, Err(AgentError::Silent | AgentError::Io(_))));
        assert!(self.heard.iter().all(|line| !has(line, "guest-shutdown")), "{:?}", self.heard);
    }
}

fn has(line: &[u8], word: &str) -> bool {
    line.windows(word.len()).any(|window| window == word.as_bytes())
}

fn sync(line: &[u8]) -> Option<Value> {
    let text = line.strip_prefix(&[DELIMITER])?;
    serde_json::from_slice::<Value>(text).ok()?.pointer("/arguments/id").cloned()
}

/// Answers as an agent does, with `before` and `after` around the answer. If it sends nothing more,
/// it is not waited for at length.
fn agent(before: &'static [u8], after: &'static str) -> Outcome {
    let limit = if after.is_empty() { REFUSAL } else { LONG };
    agent_asked_for(Mode::Reboot, limit, before, after)
}

fn agent_asked_for(
    mode: Mode,
    limit: Duration,
    before: &'static [u8],
    after: &'static str,
) -> Outcome {
    asked_for(mode, LONG, limit, move |line, to| {
        let answer = match sync(line) {
            Some(id) => [before, b"\xff", format!("{{\"return\": {id}}}\n").as_bytes()].concat(),
            None => after.into(),
        };
        to.write_all(&answer).is_ok()
    })
}

#[test]
fn an_agent_that_answers_is_asked_and_says_nothing_more() {
    let outcome = agent(b"", "");
    assert!(outcome.result.is_ok(), "{:?}", outcome.result);
    let asked: Value = serde_json::from_slice(&outcome.heard[1]).expect("JSON");
    assert_eq!(asked, json!({"execute": "guest-shutdown", "arguments": {"mode": "reboot"}}));
}

#[test]
fn what_was_in_the_pipe_before_is_not_the_answer() {
    for left in [
        &b"{\"return\": {}}\n"[..],
        b"{\"return\": 1}\n\xff{\"return\": 12345678901}\n",
        b"half a line",
        b"login: \xff\xff\xff",
        b"\xff{\"error\": {\"desc\": \"old\"}}\n",
        &[b'x'; 20_000],
    ] {
        assert!(agent(left, "").result.is_ok(), "{:?}", String::from_utf8_lossy(left));
    }
}

#[test]
fn an_agent_that_refuses_is_taken_at_its_word_but_not_at_its_length() {
    let Err(AgentError::Refuses(why)) =
        agent(b"", "{\"error\": {\"class\": \"GenericError\", \"desc\": \"not\\u001b[2J now\"}}\n")
            .result
    else {
        panic!("it refused")
    };
    assert_eq!(why, "not[2J now");
    let long = Box::leak(
        format!("{{\"error\":{{\"desc\":\"{}\"}}}}\n", "z".repeat(3000)).into_boxed_str(),
    );
    let Err(AgentError::Refuses(why)) = agent(b"", long).result else { panic!("it refused") };
    assert_eq!(why.len(), 200);
}

#[test]
fn a_clock_is_set_when_the_agent_says_so() {
    let time = Mode::SetTime(1_700_000_000_123_456_789);
    let set = |limit, after| agent_asked_for(time, limit, b"", after);
    let outcome = set(LONG, "{\"return\": {}}\n");
    assert!(outcome.result.is_ok(), "{:?}", outcome.result);
    let asked: Value = serde_json::from_slice(&outcome.heard[1]).expect("JSON");
    let time = json!({ "time": 1_700_000_000_123_456_789_u64 });
    assert_eq!(asked, json!({ "execute": "guest-set-time", "arguments": time }));
    let refused = set(LONG, "{\"error\": {\"desc\": \"no RTC\"}}\n").result;
    assert!(matches!(refused, Err(AgentError::Refuses(why)) if why == "no RTC"));
    for said in ["", "{\"return\": \n", "[]\n"] {
        assert!(matches!(set(REFUSAL, said).result, Err(AgentError::Silent)), "{said}");
    }
}

#[test]
fn silence_is_no_agent() {
    with(|_, _| true).assert_silent();
    with(|_, _| false).assert_silent();
}

#[test]
fn an_echo_is_no_agent() {
    // A shell, or a terminal without raw mode.
    with(|line, to| to.write_all(&[line, b"\n"].concat()).is_ok()).assert_silent();
}

#[test]
fn garbage_is_no_agent() {
    for said in [
        &b"\xff{\"return\": 0}\n"[..],
        b"\xff[1, 2, 3]\n\xff\"text\"\n\xffnull\n",
        b"\xff{\"return\": \n",
        b"\xff{\"return\"",
        b"\xff\xff\xff\n\n\n",
        b"\0\0\0\0\xfe\xff\xc3\x28\n",
    ] {
        with(move |_, to| to.write_all(said).is_ok()).assert_silent();
    }
}

#[test]
fn a_line_without_an_end_costs_its_time_and_no_memory() {
    let outcome = with(|_, to| {
        let junk = [b'{'; 64 << 10];
        let _ = to.write_all(b"\xff");
        // Until we hang up.
        while to.write_all(&junk).is_ok() {}
        false
    });
    outcome.assert_silent();
}

#[test]
fn a_flood_of_lines_costs_its_time() {
    with(|_, to| {
        let junk = b"\xff{\"return\": 1}\n".repeat(4096);
        while to.write_all(&junk).is_ok() {}
        false
    })
    .assert_silent();
}

#[test]
fn a_guest_that_takes_nothing_costs_its_time() {
    let (ours, theirs) = UnixStream::pair().expect("a pair");
    ours.set_nonblocking(true).expect("non-blocking");
    while (&ours).write(&[0; 4096]).is_ok() {}
    ours.set_nonblocking(false).expect("blocking");
    assert!(matches!(ask(ours, Mode::Powerdown), Err(AgentError::Io(_))));
    drop(theirs);
}
