//! The entry function of `fuzz/`, with inputs from a seeded PRNG.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, missing_docs, reason = "a test")]
#[path = "../../fuzz/src/mutate.rs"]
mod mutate;

#[test]
fn clients_that_say_anything() {
    let seeds = [
        r#"{"execute":"blockdev-add","arguments":{"node-name":"d","file":{"driver":"file","filename":"f","aio":"native"},"cache":{"direct":true},"read-only":false},"id":[1,{"a":null}]}"#,
        r#"{"execute":"device_add","arguments":{"id":"d","driver":"virtio-blk-mmio","addr":"0x1","lun":1.0}}{"execute":"stop"}"#,
        r#"{ "execute": "send-key", "arguments": { "keys": [ { "type": "qcode", "data": "ctrl" } ] } }"#,
        r#"{"execute":"netdev_add","arguments":{"id":"n","fds":"a:b","queues":2,"vhost":"off"}} {"execute":"block_resize","arguments":{"device":"d","size":1e3}}"#,
        "{\"execute\":\"migrate\",\"arguments\":{\"uri\":\"file:\\u0041\\\\\",\"resume\":true}}\r\n\0{]\n{\"execute\":5}",
    ];
    let seeds = seeds.map(|seed| seed.as_bytes().to_vec());
    mutate::hammer("qmp", &seeds, 20_000, qmp::testing::messages);
}
