use serde_json::json;

use super::*;

fn parse(text: &str) -> (Result<Request, Error>, Id) {
    Request::parse(text.as_bytes())
}

fn refused(text: &str) -> (String, Id) {
    let (request, id) = parse(text);
    (request.unwrap_err().to_string(), id)
}

#[test]
fn a_request_has_a_command_and_may_have_arguments_and_an_id() {
    let (request, id) = parse(r#"{"id":7,"arguments":{"a":1},"execute":"stop"}"#);
    let request = request.unwrap();
    assert_eq!(request.execute, "stop");
    assert_eq!(Value::from(request.arguments), json!({"a": 1}));
    assert_eq!(id, Some(json!(7)));
    let (request, id) = parse(r#"{"execute":"stop"}"#);
    assert_eq!((request.unwrap().arguments.len(), id), (0, None));
}

#[test]
fn any_id_comes_back_and_comes_back_last() {
    for id in ["1", "-0.5", "\"libvirt-1\"", "null", "true", "[1,{\"a\":[]}]", "{\"b\":1,\"a\":2}"]
    {
        let (request, found) = parse(&format!(r#"{{"execute":"stop","id":{id}}}"#));
        request.unwrap();
        let answer_text = String::from_utf8(answer(Ok(json!({})), &found)).unwrap();
        assert_eq!(answer_text, format!("{{\"return\":{{}},\"id\":{id}}}\r\n"));
    }
}

#[test]
fn what_is_wrong_with_a_request_is_named_and_keeps_its_id() {
    for (text, wrong) in [
        (r#"{"id":1}"#, "QMP input lacks member 'execute'"),
        (r#"{"id":1,"execute":1}"#, "QMP input member 'execute' must be a string"),
        (
            r#"{"id":1,"execute":"a","arguments":[]}"#,
            "QMP input member 'arguments' must be an object",
        ),
        (
            r#"{"id":1,"execute":"a","arguments":null}"#,
            "QMP input member 'arguments' must be an object",
        ),
        (r#"{"id":1,"execute":"a","control":{}}"#, "QMP input member 'control' is unexpected"),
        (r#"{"id":1,"execute":"a","execute":"b"}"#, "JSON parse error, duplicate key 'execute'"),
        (
            r#"{"id":1,"execute":"a","arguments":{"x":{"y":1,"y":2}}}"#,
            "JSON parse error, duplicate key 'y'",
        ),
        (
            r#"{"id":1,"execute":"a","arguments":{"path":"/a\u0000b"}}"#,
            "JSON parse error, NUL in a string",
        ),
    ] {
        let (answer_text, id) = refused(text);
        let answer_text = answer_text.split(" at line").next().unwrap();
        assert_eq!((answer_text, id), (wrong, Some(json!(1))), "{text}");
    }
}

#[test]
fn text_that_is_no_json_has_no_id() {
    for text in [
        r#"{"id":1,"execute":"\ud800"}"#,
        r#"{"id":1,"execute":"a","arguments":{"x":1e999}}"#,
        r#"{"id":1,"execute":"a","arguments":{"x":01}}"#,
        r#"{"id":1,"execute":"a","arguments":{"x":nul}}"#,
        r#"{"id":1,"execute":"\q"}"#,
    ] {
        let (wrong, id) = refused(text);
        assert!(wrong.starts_with("JSON parse error, "), "{wrong}");
        assert_eq!(id, None);
    }
    let (request, _) = Request::parse(b"{\"execute\":\"\xff\xfe\"}");
    assert!(request.unwrap_err().to_string().starts_with("JSON parse error, "));
}

#[test]
fn an_error_quotes_no_more_than_is_useful() {
    let long = format!(r#"{{"execute":"a","{}":1}}"#, "é".repeat(100_000));
    assert!(refused(&long).0.len() < 1100);
}
