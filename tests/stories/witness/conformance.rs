//! Every witness gives the answers of the protocol's own witness, [`replication::Witness`], to any
//! sequence of questions, whichever process asks.
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use fastrand::Rng;
use replication::{
    Answer, Incarnation, Lineage, Party, Question, Settled, Side, Term, Witness, Word,
};
use stories::replicated::etcd::{Cluster, in_memory};
use stories::replicated::witness;
use stories::seed;

use crate::rig::Asker;

/// As many questions to `uri` and to the protocol's witness.
fn conforms(uri: &str, questions: usize) -> Result<()> {
    let seed = seed::get()?;
    let mut rng = Rng::with_seed(seed);
    let mut oracle = Witness::default();
    let identity = Asker::new(uri, None)?.identify()?;
    let mut askers = Vec::new();
    for _ in 0..2 {
        let mut asker = Asker::new(uri, Some(&identity))?;
        ensure!(asker.identify()? == identity, "the identity changes");
        askers.push(asker);
    }
    let mut decided = 0;
    for number in 0..questions {
        let lineage = Lineage(rng.u128(1..3));
        // Mostly upwards, as terms are used; and old ones.
        let top = 1 + number as u64 / 20;
        let term = Term(top.saturating_sub(rng.u64(0..4)).max(1));
        let question = question(&mut rng, term);
        let wanted = oracle.step(lineage, question).answer;
        let asker = rng.choice(&mut askers).context("no asker")?;
        let answer = asker.ask(lineage, question)?;
        ensure!(
            answer == wanted,
            "{uri}, question {number} of seed {seed}: {question:?} is answered with {answer:?}, not \
             {wanted:?}"
        );
        decided += usize::from(matches!(answer, Answer::Record(Some(_))));
    }
    ensure!(decided > questions / 4 && decided < questions, "{decided} of {questions} are decided");
    Ok(())
}

fn question(rng: &mut Rng, term: Term) -> Question {
    let incarnation = |rng: &mut Rng| Incarnation(rng.u128(1..4));
    match rng.u8(0..4) {
        0 => Question::Look { term },
        1 => {
            let to = match rng.bool() {
                true => Settled::Running,
                false => Settled::Yielded { to: incarnation(rng) },
            };
            Question::Settle { term, winner: incarnation(rng), to }
        }
        _ => {
            let words = [Word::Solo, Word::Promote, Word::Promote, Word::Cold, Word::End];
            let side = if rng.bool() { Side::Primary } else { Side::Backup };
            let party = Party { side, incarnation: incarnation(rng) };
            Question::Claim { term, word: rng.choice(words).unwrap_or(Word::Solo), party }
        }
    }
}

#[test]
fn a_directory_answers_as_the_protocol_says() -> Result<()> {
    let dir = in_memory("conforms")?;
    conforms(&format!("dir:{}", dir.display()), 2000)?;
    Ok(fs::remove_dir_all(dir)?)
}

#[test]
fn a_command_answers_as_the_protocol_says() -> Result<()> {
    let dir = in_memory("exec")?;
    let script = install(&dir)?;
    conforms(&format!("exec:{script}"), 400)?;
    Ok(fs::remove_dir_all(dir)?)
}

#[test]
fn a_cluster_answers_as_the_protocol_says() -> Result<()> {
    let cluster = Cluster::start("conforms", 3)?;
    conforms(&cluster.uri(), 2000)
}

fn install(dir: &Path) -> Result<String> {
    let script = dir.join("witness");
    fs::write(&script, witness::SCRIPT)?;
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
    Ok(script.display().to_string())
}
