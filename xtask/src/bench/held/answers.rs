//! The summary of all answers, as a table and as JSON.
use std::collections::BTreeMap;
use std::fmt::Write;

use serde_json::{Value, json};

use super::{Answer, Hold, Question};
use crate::bench::statistics::quantile;

/// All answers.
#[derive(Debug, Default)]
pub struct Answers {
    answers: BTreeMap<(Hold, Question), Vec<Answer>>,
    /// What could not be blocked, and why.
    pub not_held: Vec<(Hold, String)>,
}

impl Answers {
    /// Adds one.
    pub fn add(&mut self, hold: Hold, question: Question, answer: Answer) {
        self.answers.entry((hold, question)).or_default().push(answer);
    }

    /// How many answers exceeded their time limits.
    #[must_use]
    pub fn late(&self) -> usize {
        let late =
            |(&(_, question), answers): (&(Hold, Question), &Vec<Answer>)| late(question, answers);
        self.answers.iter().map(late).sum()
    }

    /// The table for people.
    #[must_use]
    pub fn table(&self) -> String {
        let mut text = String::new();
        for hold in Hold::ALL {
            let asked = |question| self.answers.get(&(hold, question)).map(|all| (question, all));
            let rows: Vec<_> = Question::ALL.into_iter().filter_map(asked).collect();
            if rows.is_empty() {
                continue;
            }
            // Writing to a string does not fail.
            let _ = writeln!(
                text,
                "\n{:<48}{:>6}{:>10}{:>10}{:>10}{:>10}{:>6}{:>9}",
                hold.title(),
                "n",
                "median",
                "p95",
                "max",
                "bound",
                "late",
                "refused"
            );
            for (question, answers) in rows {
                let seconds: Vec<f64> = answers.iter().map(|answer| answer.seconds()).collect();
                let at = |part| shown(quantile(&seconds, part).unwrap_or(f64::NAN));
                let refused = |answer: &&Answer| matches!(answer, Answer::Refused(_));
                let _ = writeln!(
                    text,
                    "  {:<46}{:>6}{:>10}{:>10}{:>10}{:>10}{:>6}{:>9}",
                    question.label(),
                    answers.len(),
                    at(0.5),
                    at(0.95),
                    at(1.0),
                    shown(question.bound().as_secs_f64()),
                    late(question, answers),
                    answers.iter().filter(refused).count()
                );
            }
        }
        text
    }

    /// Everything, for programs.
    #[must_use]
    pub fn json(&self) -> Value {
        let rows: Vec<Value> = self
            .answers
            .iter()
            .map(|(&(hold, question), answers)| {
                json!({
                    "held": hold,
                    "question": question,
                    "bound": question.bound().as_secs_f64(),
                    "late": late(question, answers),
                    "answers": answers,
                })
            })
            .collect();
        json!({ "rows": rows, "not_held": self.not_held })
    }
}

fn late(question: Question, answers: &[Answer]) -> usize {
    let bound = question.bound().as_secs_f64();
    answers.iter().filter(|answer| answer.seconds() > bound).count()
}

/// Seconds, as text for people. A median between an answer and a missing one counts as missing.
fn shown(seconds: f64) -> String {
    if seconds.is_finite() { format!("{:.1} ms", seconds * 1e3) } else { "none".to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silence_is_late_and_a_refusal_in_time_is_not() {
        let mut answers = Answers::default();
        for answer in [Answer::Done(0.01), Answer::Refused(0.99), Answer::Silence] {
            answers.add(Hold::Flood, Question::Stop, answer);
        }
        assert_eq!(answers.late(), 1);
        answers.add(Hold::Fifo, Question::Status, Answer::Done(0.11));
        assert_eq!(answers.late(), 2);

        let table = answers.table();
        let line = table.lines().find(|line| line.starts_with("  stop")).unwrap();
        let words: Vec<_> = line.split_whitespace().collect();
        assert_eq!(words, ["stop", "3", "990.0", "ms", "none", "none", "1000.0", "ms", "1", "1"]);
        assert!(!table.contains("SIGTERM"), "{table}");
    }

    #[test]
    fn all_that_was_answered_is_in_the_json() {
        let mut answers = Answers::default();
        answers.add(Hold::Fifo, Question::Quit, Answer::Silence);
        answers.add(Hold::Fifo, Question::Quit, Answer::Done(0.5));
        let json = answers.json();
        assert_eq!(json["rows"][0]["held"], "fifo");
        assert_eq!(json["rows"][0]["answers"], json!(["silence", { "done": 0.5 }]));
        assert_eq!(json["rows"][0]["late"], 1);
    }
}
