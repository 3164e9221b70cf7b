//! Frames that no primary sends. Each is refused by name, and the backup keeps what it has: its
//! primary, which was only unlucky, connects again.
use replication::{
    Accept, Pair,
    contents::{Encoder, PAGE},
};

use super::*;
use crate::{
    checkpoint::last_frames,
    replication::{
        offer::{self, Aside},
        outgoing::MACHINE,
        outside::{OUTSIDE, Outside},
    },
};

const PRIMARY: Incarnation = Incarnation(77);

/// A primary that is driven by hand.
struct Peer {
    stream: UnixStream,
    /// What was received and not read.
    bytes: Vec<u8>,
    encoder: Encoder,
}

/// What a backup says.
#[derive(Debug, PartialEq)]
enum Said {
    Frame(Frame),
    Reason(String),
    End,
}

impl Peer {
    fn connect(far: &Path, greeting: &[u8]) -> Self {
        let mut stream = UnixStream::connect(far).unwrap();
        stream.set_read_timeout(Some(LONG)).unwrap();
        stream.write_all(greeting).unwrap();
        Self { stream, bytes: Vec::new(), encoder: Encoder::new(false, 0) }
    }

    /// The next thing that is no beat.
    fn hear(&mut self) -> Said {
        loop {
            if let Some((aside, length)) = offer::read_aside(&self.bytes) {
                self.bytes.drain(..length);
                match aside {
                    Aside::Reason(why) => return Said::Reason(why),
                    Aside::Process(_) => continue,
                }
            }
            if let Ok((frame, length)) = wire::decode(&self.bytes) {
                self.bytes.drain(..length);
                match frame.message {
                    Message::Beat { .. } => continue,
                    _ => return Said::Frame(frame),
                }
            }
            let mut piece = [0; 4096];
            match self.stream.read(&mut piece) {
                Ok(0) | Err(_) => return Said::End,
                Ok(length) => self.bytes.extend(&piece[..length]),
            }
        }
    }

    fn message(&self, epoch: u64, message: Message) {
        let frame = Frame { term: Term(1), epoch: Epoch(epoch), message };
        // It may have been closed.
        let _ = (&self.stream).write_all(&wire::encode(&frame));
    }

    fn is_accepted(&mut self, epoch: u64) {
        match self.hear() {
            Said::Frame(Frame {
                epoch: whole, message: Message::Accept(Accept { .. }), ..
            }) => {
                assert_eq!(whole, Epoch(epoch));
            }
            other => panic!("{other:?}"),
        }
    }

    /// Be its primary, with one whole epoch.
    fn protect(&mut self) {
        self.is_accepted(0);
        self.message(0, Message::Sync { base: None });
        let epoch = epoch(&mut self.encoder, 1, |encoder, to| {
            encoder.page(0x2000, &[7; PAGE], to);
            sections_of(encoder, &Outside::default().encode(), to);
        });
        self.stream.write_all(&epoch).unwrap();
        self.message(1, Message::End { digest: Digest(1) });
        let ack = Frame { term: Term(1), epoch: Epoch(1), message: Message::Ack };
        assert_eq!(self.hear(), Said::Frame(ack));
        self.message(1, Message::Armed(Pair { primary: PRIMARY, backup: Incarnation(2) }));
    }
}

#[test]
fn strangers_do_not_take_the_place_of_a_primary_that_waits() {
    let (_directory, _, far) = places();
    let backup = Backup::at(&far, Given::None);
    let mut primary = Peer::connect(&far, &greeting(1, |_| {}));
    primary.is_accepted(0);
    // Its offer has come, its greeting not yet.
    let all = greeting(1, |_| {});
    let (offer, hello) = all.split_at(Offer::decode(&all).unwrap().unwrap().1);
    let mut waits = Peer::connect(&far, offer);
    let aside = offer::process(Process::own().as_ref()).len();
    waits.stream.read_exact(&mut vec![0; aside]).unwrap();
    let strangers: Vec<_> = (0..10).map(|_| UnixStream::connect(&far).unwrap()).collect();
    // The first ones have made room for the others.
    assert_eq!((&strangers[0]).read(&mut [0]).unwrap(), 0);
    waits.stream.write_all(hello).unwrap();
    let refused = waits.hear();
    let is_refused =
        |said: &Said| matches!(said, Said::Frame(Frame { message: Message::Refuse(_), .. }));
    assert!(is_refused(&refused), "{refused:?}");
    primary.message(0, Message::Sync { base: None });
    wait_for("its primary", || backup.status.lock().state == ReplicationStatus::Syncing);
    assert!(backup.end().is_err());
}

#[test]
fn a_backup_that_is_ended_says_so() {
    let (_directory, _, far) = places();
    let backup = Backup::at(&far, Given::None);
    let mut primary = Peer::connect(&far, &greeting(1, |_| {}));
    primary.protect();
    wait_for("standby", || backup.status.lock().state == ReplicationStatus::Standby);
    let ended = backup.end();
    assert!(ended.is_err_and(|e| e.to_string().contains("as it was told to")));
    let said = primary.hear();
    let left = |said: &Said| {
        matches!(said, Said::Frame(Frame { message: Message::Bye { end: false }, .. }))
    };
    assert!(left(&said), "{said:?}");
    assert_eq!(primary.hear(), Said::End);
}

fn sections_of(encoder: &mut Encoder, outside: &[u8], to: &mut Vec<u8>) {
    let machine = last_frames(&config(1), sections().try_into().unwrap()).unwrap();
    encoder.section(MACHINE, &machine, to).unwrap();
    encoder.section(OUTSIDE, outside, to).unwrap();
}

/// An epoch with these contents, but for its `End`.
fn epoch(
    encoder: &mut Encoder,
    number: u64,
    contents: impl FnOnce(&mut Encoder, &mut Vec<u8>),
) -> Vec<u8> {
    let mut to = Vec::new();
    encoder.begin((Term(1), Epoch(number)), 1 << 20, 0, &mut to);
    contents(encoder, &mut to);
    encoder.close(&mut to);
    to
}

/// A frame of contents with any body.
fn raw(kind: u32, body: &[u8]) -> Vec<u8> {
    let mut frame = kind.to_le_bytes().to_vec();
    frame.extend(u32::try_from(16 + body.len()).unwrap().to_le_bytes());
    frame.extend(1u64.to_le_bytes());
    frame.extend(2u64.to_le_bytes());
    frame.extend(body);
    frame.extend(crc32fast::hash(&frame).to_le_bytes());
    frame
}

/// Begins epoch 2 with these frames.
fn begun(encoder: &mut Encoder, frames: &[Vec<u8>]) -> Vec<u8> {
    let mut to = Vec::new();
    encoder.begin((Term(1), Epoch(2)), 1 << 20, 0, &mut to);
    to.extend(frames.concat());
    to
}

fn end(term: u64, epoch: u64) -> Vec<u8> {
    let (term, epoch) = (Term(term), Epoch(epoch));
    wire::encode(&Frame { term, epoch, message: Message::End { digest: Digest(9) } })
}

type Bad = (&'static str, fn(&mut Encoder) -> Vec<u8>);

/// What the backup says, and what it says it of.
const BAD: &[Bad] = &[
    ("damaged (checksum)", |encoder| {
        let mut epoch = epoch(encoder, 2, |encoder, to| encoder.page(0x3000, &[1; PAGE], to));
        epoch[100] ^= 4;
        epoch
    }),
    ("claims 4294967295 bytes", |_| [33, u32::MAX].map(u32::to_le_bytes).concat()),
    ("unknown kind", |_| raw(99, &[])),
    ("outside of an epoch", |_| raw(33, &[0; 32])),
    ("epoch 1 comes where 2 should", |_| end(1, 1)),
    ("epoch 2 comes where 2 should", |_| end(1, 2)),
    ("epoch 4 comes where 2 should", |encoder| epoch(encoder, 4, |_, _| {})),
    ("not of", |encoder| {
        let mut to = Vec::new();
        encoder.begin((Term(7), Epoch(2)), 1, 0, &mut to);
        to
    }),
    ("are not guest memory", |encoder| {
        epoch(encoder, 2, |encoder, to| encoder.page(1 << 40, &[1; PAGE], to))
    }),
    ("0x1001", |encoder| epoch(encoder, 2, |encoder, to| encoder.page(0x1001, &[1; PAGE], to))),
    ("twice", |encoder| {
        epoch(encoder, 2, |encoder, to| {
            (0..2).for_each(|_| encoder.page(0x3000, &[1; PAGE], to));
        })
    }),
    ("round", |encoder| {
        // What was sent in a round of an earlier connection is no base in this one.
        let delta = [&0x2000u64.to_le_bytes()[..], &5u32.to_le_bytes(), &1u16.to_le_bytes(), &[0]];
        begun(encoder, &[raw(35, &delta.concat())])
    }),
    ("0x3000", |encoder| {
        // 255 repeated: it would unpack to far more than a page.
        let bomb = [&[0x1f, 0, 1, 0][..], &[255; 200], &[0]].concat();
        let length = u16::try_from(bomb.len()).unwrap();
        let page = [&0x3000u64.to_le_bytes()[..], &length.to_le_bytes(), &bomb];
        begun(encoder, &[raw(33, &page.concat())])
    }),
    ("section", |encoder| {
        epoch(encoder, 2, |encoder, to| encoder.section("firmware", b"?", to).unwrap())
    }),
    ("missing, repeated or reordered", |encoder| begun(encoder, &[raw(38, &[0; 32])])),
];

#[test]
fn a_bad_frame_is_refused_by_name_and_costs_no_more_than_a_connection() {
    let (_directory, _, far) = places();
    let backup = Backup::at(&far, Given::None);
    let mut peer = Peer::connect(&far, &greeting(1, |_| {}));
    peer.protect();
    let whole = backup.memory();
    for (name, bad) in BAD {
        wait_for("the backup", || backup.status.lock().state == ReplicationStatus::Standby);
        let bytes = bad(&mut peer.encoder);
        // It may be closed before all of it is sent.
        let _ = peer.stream.write_all(&bytes);
        match peer.hear() {
            Said::Reason(why) => assert!(why.contains(name), "{name}: {why}"),
            other => panic!("{name}: {other:?}"),
        }
        assert_eq!(peer.hear(), Said::End, "{name}");
        peer = Peer::connect(&far, &greeting_after(Epoch(1), 1, |_| {}));
        peer.is_accepted(1);
        wait_for("memory", || backup.memory() == whole);
    }
    assert_eq!(backup.rooms.lock().len(), 1);
    assert!(backup.end().is_err());
}

#[test]
fn an_epoch_that_is_no_machine_is_not_held() {
    let (_directory, _, far) = places();
    let backup = Backup::at(&far, Given::None);
    let mut peer = Peer::connect(&far, &greeting(1, |_| {}));
    peer.protect();
    let whole = backup.memory();
    let cases: [fn(&mut Encoder, &mut Vec<u8>); 3] = [
        |encoder, to| encoder.section(MACHINE, b"no machine", to).unwrap(),
        |encoder, to| sections_of(encoder, b"\x02", to),
        |encoder, to| {
            // Of another machine than the one that was offered.
            let mut other = config(1);
            other.machine.vcpus += 1;
            let machine = last_frames(&other, sections().try_into().unwrap()).unwrap();
            encoder.section(MACHINE, &machine, to).unwrap();
            encoder.section(OUTSIDE, &Outside::default().encode(), to).unwrap();
        },
    ];
    for contents in cases {
        let bytes = epoch(&mut peer.encoder, 2, |encoder, to| {
            encoder.page(0x3000, &[1; PAGE], to);
            contents(encoder, to);
        });
        peer.stream.write_all(&bytes).unwrap();
        peer.message(2, Message::End { digest: Digest(2) });
        match peer.hear() {
            Said::Frame(Frame { message: Message::Nack(_), .. }) => {}
            other => panic!("{other:?}"),
        }
        peer = Peer::connect(&far, &greeting_after(Epoch(1), 1, |_| {}));
        peer.is_accepted(1);
        wait_for("memory", || backup.memory() == whole);
    }
    assert!(backup.end().is_err());
}

#[test]
fn half_a_frame_and_another_domain_change_nothing() {
    let (_directory, _, far) = places();
    let backup = Backup::at(&far, Given::None);
    let mut peer = Peer::connect(&far, &greeting(1, |_| {}));
    peer.protect();
    let whole = backup.memory();
    let half = epoch(&mut peer.encoder, 2, |encoder, to| encoder.page(0x3000, &[1; PAGE], to));
    peer.stream.write_all(&half[..half.len() / 2]).unwrap();
    drop(peer);
    // A later term of its own primary is that of an owner; of anybody else, nothing.
    let mut stranger = Peer::connect(&far, &greeting(9, |_| {}));
    let Said::Frame(Frame { message, .. }) = stranger.hear() else { panic!("no answer") };
    assert_eq!(message, Message::Refuse(replication::Refusal::Lineage));
    let mut peer = Peer::connect(&far, &greeting_after(Epoch(1), 1, |_| {}));
    peer.is_accepted(1);
    // What comes for a term that is over is not even looked at.
    let old = Frame { term: Term(0), epoch: Epoch(5), message: Message::Release };
    peer.stream.write_all(&wire::encode(&old)).unwrap();
    peer.message(1, Message::Release);
    wait_for("the release", || backup.status.lock().state == ReplicationStatus::Suspecting);
    wait_for("memory", || backup.memory()[3 * 4096..] == whole[3 * 4096..]);
    let promotion = backup.thread.join().unwrap().unwrap();
    assert_eq!(promotion.epoch, Epoch(1));
}
