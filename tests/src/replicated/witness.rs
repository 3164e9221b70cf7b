//! A witness in this process: of each term it keeps who closed it first. It can be cut off from
//! either host.
use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde_json::{Map, Value, json};

use crate::lab::hosts::Side;

/// A witness that is a shell script, with its records in a directory beside it.
pub const SCRIPT: &str = include_str!("witness.sh");

/// The records of all terms, and who reaches them.
#[derive(Debug, Default)]
pub struct Witness(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// By lineage and term.
    records: BTreeMap<(String, u64), Map<String, Value>>,
    cut: [bool; 2],
}

impl Witness {
    /// Cuts it off from a host, or joins them again.
    pub fn cut(&self, side: Side, cut: bool) {
        if let Some(place) = self.lock().cut.get_mut(side.port()) {
            *place = cut;
        }
    }

    /// The record of a term, if it is closed.
    #[must_use]
    pub fn record(&self, lineage: &str, term: u64) -> Option<Map<String, Value>> {
        self.lock().records.get(&(lineage.to_owned(), term)).cloned()
    }

    /// Answers a question, the data of the event REPLICATION_NEEDS: returns the arguments of
    /// `replication-answer`.
    #[must_use]
    pub fn answer(&self, from: Side, asked: &Value) -> Value {
        let mut answer = self.result(from, asked);
        for name in ["nonce", "need"] {
            answer.insert(name.to_owned(), member(asked, name));
        }
        Value::Object(answer)
    }

    fn result(&self, from: Side, asked: &Value) -> Map<String, Value> {
        let mut state = self.lock();
        if state.cut.get(from.port()) != Some(&false) {
            return unknown("the witness is cut off");
        }
        let (lineage, term) = (member(asked, "lineage"), member(asked, "term"));
        let (Some(lineage), Some(term)) = (lineage.as_str(), term.as_u64()) else {
            return unknown("no question to a witness");
        };
        let key = (lineage.to_owned(), term);
        let is_later = |(of, later): &(String, u64)| of == lineage && *later > term;
        if state.records.keys().any(is_later) {
            return Map::from_iter([("result".to_owned(), json!("superseded"))]);
        }
        match member(asked, "need").as_str() {
            Some("look") => {}
            Some("claim") => {
                state.records.entry(key.clone()).or_insert_with(|| {
                    let names = ["word", "side", "incarnation"];
                    names.map(|name| (name.to_owned(), member(asked, name))).into_iter().collect()
                });
            }
            Some("settle") => {
                let record = state.records.get_mut(&key);
                let record = record.filter(|record| {
                    record.get("incarnation") == asked.get("winner")
                        && !record.contains_key("settled")
                });
                if let Some(record) = record {
                    for (name, from) in [("settled", "to"), ("yielded-to", "yielded-to")] {
                        if let Some(value) = asked.get(from) {
                            record.insert(name.to_owned(), value.clone());
                        }
                    }
                }
            }
            _ => return unknown("there is only a witness"),
        }
        let record = state.records.get(&key).cloned().map_or(Value::Null, Value::Object);
        Map::from_iter([("result".to_owned(), json!("record")), ("record".to_owned(), record)])
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn unknown(reason: &str) -> Map<String, Value> {
    Map::from_iter([("result".to_owned(), json!("unknown")), ("reason".to_owned(), json!(reason))])
}

/// A member of an object, or null.
fn member(object: &Value, name: &str) -> Value {
    object.get(name).cloned().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claim(term: u64, word: &str, incarnation: &str) -> Value {
        let (need, lineage) = ("claim", "L");
        json!({ "nonce": 5, "need": need, "lineage": lineage, "term": term, "word": word, "side": "backup", "incarnation": incarnation })
    }

    #[test]
    fn the_first_claim_of_a_term_wins() {
        let witness = Witness::default();
        let first = witness.answer(Side::Right, &claim(3, "promote", "B"));
        assert_eq!(first["record"]["incarnation"], "B");
        assert_eq!((&first["nonce"], &first["need"]), (&json!(5), &json!("claim")));
        let second = witness.answer(Side::Left, &claim(3, "solo", "A"));
        assert_eq!(second["record"], first["record"]);
        let before = witness.answer(Side::Left, &claim(2, "solo", "A"));
        assert_eq!(before["result"], "superseded");
        let next = witness.answer(Side::Left, &claim(4, "solo", "A"));
        assert_eq!(next["record"]["word"], "solo");
    }

    #[test]
    fn a_promotion_is_settled_once_and_by_its_winner() {
        let witness = Witness::default();
        let _ = witness.answer(Side::Right, &claim(1, "promote", "B"));
        let settle = |winner: &str, to: &str| {
            witness.answer(
                Side::Right,
                &json!({ "need": "settle", "lineage": "L", "term": 1, "winner": winner, "to": to }),
            )
        };
        assert_eq!(settle("A", "running")["record"]["settled"], Value::Null);
        assert_eq!(settle("B", "running")["record"]["settled"], "running");
        assert_eq!(settle("B", "yielded")["record"]["settled"], "running");
    }

    #[test]
    fn who_is_cut_off_gets_no_answer_and_changes_nothing() {
        let witness = Witness::default();
        witness.cut(Side::Left, true);
        assert_eq!(witness.answer(Side::Left, &claim(1, "solo", "A"))["result"], "unknown");
        assert_eq!(witness.record("L", 1), None);
        witness.cut(Side::Left, false);
        assert_eq!(witness.answer(Side::Left, &claim(1, "solo", "A"))["result"], "record");
    }
}
