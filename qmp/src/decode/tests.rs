use serde::Deserialize;
use serde_json::json;

use super::*;
use crate::schema::{BlockdevAdd, BlockdevAio, DeviceAdd, DeviceDel, Stop};

#[derive(Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
struct Sample {
    size: u64,
    small: Option<u8>,
    signed: Option<i64>,
    flag: Option<bool>,
    list: Option<Vec<u16>>,
}

fn sample(arguments: Value) -> Result<Sample, String> {
    read(arguments)
}

fn read<T: DeserializeOwned>(arguments: Value) -> Result<T, String> {
    let Value::Object(arguments) = arguments else { panic!("no object") };
    decode(arguments).map_err(|e| e.to_string())
}

#[test]
fn whole_numbers_are_integers_however_they_are_written() {
    for number in ["1024", "1024.0", "1.024e3", "10240E-1"] {
        let arguments: Value = serde_json::from_str(&format!("{{\"size\":{number}}}")).unwrap();
        assert_eq!(sample(arguments).unwrap().size, 1024, "{number}");
    }
    let zero: Value = serde_json::from_str(r#"{"size":-0}"#).unwrap();
    assert_eq!(sample(zero).unwrap().size, 0);
    assert_eq!(sample(json!({"size": u64::MAX})).unwrap().size, u64::MAX);
    assert_eq!(sample(json!({"size": 0, "signed": -3})).unwrap().signed, Some(-3));
}

#[test]
fn numbers_that_do_not_fit_are_refused() {
    for number in ["1.5", "-1", "-1.0", "18446744073709551616", "1e300"] {
        let arguments: Value = serde_json::from_str(&format!("{{\"size\":{number}}}")).unwrap();
        let wrong = sample(arguments).unwrap_err();
        assert!(wrong.contains("'size'"), "{number}: {wrong}");
    }
    assert_eq!(
        sample(json!({"size": 1, "small": 256})).unwrap_err(),
        "Parameter 'small' does not accept value integer `256`, expected: u8"
    );
}

#[test]
fn on_and_off_are_booleans() {
    for (given, meant) in [(json!("on"), true), (json!("off"), false), (json!(true), true)] {
        assert_eq!(sample(json!({"size": 0, "flag": given})).unwrap().flag, Some(meant));
    }
    assert!(sample(json!({"size": 0, "flag": "maybe"})).is_err());
    assert!(sample(json!({"size": 0, "flag": 1})).is_err());
}

#[test]
fn errors_name_the_parameter_as_qemu_does() {
    for (arguments, wrong) in [
        (json!({}), "Parameter 'node-name' is missing"),
        (json!({"node-name": "a", "file": {}}), "Parameter 'file.filename' is missing"),
        (
            json!({"node-name": "a", "file": {"filename": 1}}),
            "Invalid parameter type for 'file.filename', expected: a string",
        ),
        (
            json!({"node-name": "a", "file": ["file", "/x"]}),
            "Invalid parameter type for 'file', expected: an object",
        ),
        (
            json!({"node-name": "a", "file": {"filename": "/x", "locking": "on"}}),
            "Parameter 'file.locking' is unexpected (known here: driver, filename, aio)",
        ),
        (
            json!({"node-name": "a", "file": {"filename": "/x", "aio": "fast"}}),
            "Parameter 'file.aio' does not accept value 'fast', \
             expected: one of native, io_uring, threads, off",
        ),
    ] {
        assert_eq!(read::<BlockdevAdd>(arguments).unwrap_err(), wrong);
    }
    assert_eq!(
        read::<Stop>(json!({"now": true})).unwrap_err(),
        "Parameter 'now' is unexpected (there are none)"
    );
    assert_eq!(
        sample(json!({"size": 0, "list": [1, "x"]})).unwrap_err(),
        "Invalid parameter type for 'list.1', expected: u16"
    );
}

/// Verbatim requests of the runtimes and the documentation.
#[test]
fn known_clients_are_understood() {
    let kata: BlockdevAdd = read(json!({"driver":"raw","file":{"aio":"native","driver":"file",
        "filename":"/dev/dm-3"},"node-name":"drive-1","read-only":false}))
    .unwrap();
    assert_eq!(kata.file.aio, Some(BlockdevAio::Native));
    let kuasar: BlockdevAdd = read(json!({"driver":"raw","read-only":false,"node-name":"drive-0",
        "cache":{"direct":true},"file":{"driver":"file","filename":"/dev/dm-8"}}))
    .unwrap();
    assert_eq!(kuasar.cache.unwrap().direct, Some(true));
    let manual: BlockdevAdd = read(json!({"node-name":"drive-0","file":{"driver":"file",
        "filename":"/path"},"cache":{"direct":true},"read-only":"off","throttling.iops-total":100}))
    .unwrap();
    assert_eq!((manual.read_only, manual.throttling_iops_total), (Some(false), Some(100)));

    let kata: DeviceAdd = read(json!({"addr":"1","drive":"drive-1","driver":"virtio-blk-mmio",
        "id":"drive-1","romfile":"","logical_block_size":512,"physical_block_size":4096}))
    .unwrap();
    assert_eq!((kata.addr.as_deref(), kata.logical_block_size), (Some("1"), Some(512)));
    let kuasar: DeviceAdd = read(json!({"driver":"virtio-blk-pci","id":"virtio-drive-0",
        "bus":"pcie.1","addr":"0x0","drive":"drive-0"}))
    .unwrap();
    assert_eq!(kuasar.bus.as_deref(), Some("pcie.1"));
    assert_eq!(read::<DeviceDel>(json!({"id":"net-0"})).unwrap().id, "net-0");
}
