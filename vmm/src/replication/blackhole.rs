//! A backup that keeps nothing: replication into it costs what replication costs, and protects
//! nothing.
use replication::{Accept, Digest, Epoch, Frame, Hello, Incarnation, Message};

/// What such a backup answers to `frame`, if anything. An `End` is answered by [`ack`] once its
/// epoch has been encoded.
pub fn answer(frame: &Frame) -> Option<Frame> {
    let message = match frame.message {
        Message::Hello(Hello { incarnation, agreement, .. }) => Message::Accept(Accept {
            // Any other than the primary's.
            incarnation: Incarnation(!incarnation.0),
            digest: Digest::default(),
            memory: None,
            agreement,
        }),
        Message::Beat { probe, .. } => Message::Beat { claimed: false, unfit: false, probe },
        Message::Bye { end: true } => Message::Ended,
        _ => return None,
    };
    Some(Frame { message, ..*frame })
}

/// The acknowledgement of `epoch` in the term of `end`.
pub fn ack(end: Frame, epoch: Epoch) -> Frame {
    Frame { epoch, message: Message::Ack, ..end }
}
