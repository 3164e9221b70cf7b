use std::sync::{
    Arc,
    atomic::{AtomicU32, Ordering},
};

use super::*;
use crate::Device;

fn controller() -> (I8042, Arc<AtomicU32>) {
    let resets = Arc::new(AtomicU32::new(0));
    let counter = resets.clone();
    let power: PowerSink = Arc::new(move |event| {
        assert_eq!(event, PowerEvent::Reset);
        counter.fetch_add(1, Ordering::Relaxed);
    });
    (I8042::new("i8042", Line::new().unwrap(), power), resets)
}

impl I8042 {
    fn command(&mut self, command: u8) {
        self.write(COMMAND, &[command]);
    }
    fn send(&mut self, byte: u8) {
        self.write(DATA, &[byte]);
    }
    fn status(&mut self) -> u8 {
        let mut byte = [0];
        self.read(COMMAND, &mut byte);
        byte[0]
    }
    /// All bytes that a driver would get.
    fn receive(&mut self) -> Vec<u8> {
        let mut all = Vec::new();
        while self.status() & STATUS_OUTPUT_FULL != 0 {
            let mut byte = [0];
            self.read(DATA, &mut byte);
            all.push(byte[0]);
        }
        all
    }
    fn interrupted(&mut self) -> bool {
        self.line.eventfd().read().is_ok()
    }
}

#[test]
fn linux_finds_a_controller_a_keyboard_and_no_mouse() {
    let (mut k, _) = controller();
    // i8042_controller_check, _selftest, _init
    assert!(k.receive().is_empty());
    k.command(0xaa);
    assert_eq!(k.receive(), [0x55]);
    k.command(0x20);
    let control = k.receive()[0];
    assert_ne!(control & CTR_TRANSLATE, 0);
    let quiet = (control | CTR_DISABLE) & !CTR_INTERRUPT;
    k.command(0x60);
    k.send(quiet);
    k.command(0x20);
    assert_eq!(k.receive(), [quiet]);
    while k.interrupted() {}
    assert_ne!(k.status() & STATUS_UNLOCKED, 0);
    // i8042_check_aux: the loop-back answer lacks the mouse's bit, the port test fails.
    k.command(0xd3);
    k.send(0x5a);
    assert_eq!(k.status() & 0x20, 0);
    assert_eq!(k.receive(), [0x5a]);
    k.command(0xa9);
    assert_eq!(k.receive(), [0x01]);
    assert!(!k.interrupted());
    // i8042_enable_kbd_port, atkbd_probe, atkbd_activate
    k.command(0x60);
    k.send(control | CTR_INTERRUPT);
    for (sent, reply) in [
        (0xf2, &[ACK, 0xab, 0x41][..]),
        (0xed, &[ACK]),
        (0x02, &[ACK]),
        (0xf3, &[ACK]),
        (0x20, &[ACK]),
        (0xf4, &[ACK]),
        (0xff, &[ACK, 0xaa]),
        (0xee, &[0xee]),
        (0x77, &[RESEND]),
    ] {
        k.send(sent);
        assert!(k.interrupted(), "{sent:#x}");
        assert_eq!(k.receive(), reply, "{sent:#x}");
    }
}

#[test]
fn each_byte_of_ctrl_alt_del_interrupts() {
    let (mut k, _) = controller();
    assert!(k.send_ctrl_alt_del());
    let mut keys = Vec::new();
    while k.interrupted() {
        let mut byte = [0];
        k.read(DATA, &mut byte);
        keys.push(byte[0]);
    }
    assert_eq!(keys, CTRL_ALT_DEL_1);
    k.command(0x60);
    k.send(CTR_INTERRUPT);
    assert!(k.send_ctrl_alt_del());
    assert_eq!(k.receive(), CTRL_ALT_DEL_2);
}

#[test]
fn a_guest_that_does_not_listen_gets_no_keys() {
    let (mut k, _) = controller();
    while k.send_ctrl_alt_del() {}
    assert!(k.receive().len() <= BUFFER);
    k.command(0xad);
    assert!(!k.send_ctrl_alt_del());
    k.command(0xae);
    k.send(0xf5);
    k.receive();
    assert!(!k.send_ctrl_alt_del());
    k.send(0xf4);
    k.receive();
    assert!(k.send_ctrl_alt_del());
}

#[test]
fn resets_by_pulse_and_by_output_port() {
    let (mut k, resets) = controller();
    k.command(0xfe);
    k.command(0xd1);
    k.send(0x02);
    assert_eq!(resets.load(Ordering::Relaxed), 2);
    k.command(0xd1);
    k.send(0x03);
    k.command(0xff);
    assert_eq!(resets.load(Ordering::Relaxed), 2, "line 0 stays high");
}

#[test]
fn random_writes_of_any_width_stay_bounded() {
    let (mut k, _) = controller();
    let mut seed = 1u64;
    for _ in 0..100_000 {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let [offset, value, width, ..] = seed.to_be_bytes();
        let data = [value; 8];
        let width = usize::from(width % 9);
        k.write(u64::from(offset % 8), &data[..width]);
        k.read(u64::from(value % 8), &mut [0; 8][..width]);
        assert!(k.registers.keyboard.sent.len() <= BUFFER);
    }
    k.write(u64::MAX, &[0xfe]);
}

#[test]
fn moves_in_the_middle_of_a_command() {
    let (mut k, _) = controller();
    k.send(0xf2);
    k.command(0x60);
    let section = Device::save(&k).unwrap();
    let (mut to, _) = controller();
    Device::restore(&mut to, &section).unwrap();
    assert_eq!(Device::save(&to).unwrap(), section);
    assert!(to.interrupted());
    to.send(0x41);
    assert_eq!(to.registers.control, 0x41);
    assert_eq!(to.receive(), [ACK, 0xab, 0x41]);
    Device::reset(&mut to);
    let (fresh, _) = controller();
    assert_eq!(Device::save(&to).unwrap(), Device::save(&fresh).unwrap());
    let mut state = Snapshot::save(&k).unwrap();
    state.sent.0 = vec![0; BUFFER + 1];
    assert!(Snapshot::restore(&mut to, state).is_err());
}
