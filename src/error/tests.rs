//! What each error says.

use super::*;

#[test]
fn errors_read_as_sentences_that_name_the_culprit() {
    let error = Error::NoService { service: "demo.v1".into(), method: None };
    assert_eq!(error.to_string(), "nobody serves `demo.v1`: is a server running, and on the same namespace?");
    let disconnected = |method: Option<&str>, may_have_run| {
        let method = method.map(Into::into);
        let error = Error::Disconnected { method, may_have_run, reason: "reset".into() };
        error.to_string()
    };
    assert_eq!(disconnected(None, false), "there is no connection to the broker (reset)");
    let ran = "`demo.v1.add` may have run: there is no connection to the broker (reset)";
    assert_eq!(disconnected(Some("demo.v1.add"), true), ran);
    let not_run = "`demo.v1.add` has not run: there is no connection to the broker (reset)";
    assert_eq!(disconnected(Some("demo.v1.add"), false), not_run);
    let timeout = |why| {
        let error = Error::Timeout { method: "demo.v1.add".into(), after: Duration::from_secs(2), why };
        error.to_string()
    };
    assert!(timeout(Unanswered::Unknown).ends_with("within 2s: it may have run; allow more time with `.timeout()`"));
    assert!(timeout(Unanswered::Unserved).contains("nobody served it whenever the broker was asked"));
    assert!(timeout(Unanswered::Unsent).ends_with("it was not sent, since no time was left"));
    assert!(
        timeout(Unanswered::Congested)
            .contains("it was not sent: the connection to the broker, or the queue, takes less")
    );
    assert!(!Unanswered::Congested.may_have_run() && Unanswered::Unserved.may_have_run());
    let error = CallError::Service(std::net::IpAddr::from([127, 0, 0, 1]));
    assert_eq!(error.to_string(), "the service returned its own error: 127.0.0.1", "not as it is debugged");
    let too_large = |what, whose| Error::TooLarge { what, size: 2, limit: 1, whose }.to_string();
    let request =
        "the request takes 2 bytes, over the client's cap of 1: send less, or raise `max_message_size` on both sides";
    assert_eq!(too_large("request", "client's"), request);
    assert!(too_large("request", "broker's").ends_with("`max_message_size` in the broker's configuration"));
    assert_eq!(too_large("metadata", "fixed"), "the metadata takes 2 bytes, over the fixed cap of 1: shorten it");
    let unheard = Error::NoSubscriber { key: "order.created".into() }.to_string();
    assert!(unheard.starts_with("nobody gets the event `order.created`: start a subscriber or a group"), "{unheard}");
    let nobody = Error::NoService { service: "demo.v1@i1".into(), method: None }.to_string();
    assert!(nobody.starts_with("there is no instance `i1` of `demo.v1`: "), "{nobody}");
}

#[test]
fn each_variant_says_what_the_table_in_its_documentation_says() {
    let text = String::new;
    let timeout = |why| Error::Timeout { method: text(), after: Duration::ZERO, why };
    let too_large = |what| Error::TooLarge { what, size: 2, limit: 1, whose: "client's" };
    let blocked = |may_have_run| Error::Blocked { method: None, reason: text(), after: Duration::ZERO, may_have_run };
    let disconnected = |may_have_run| Error::Disconnected { method: None, may_have_run, reason: text() };
    let no_quorum = Error::NoQuorum { service: text(), good: 1, needed: 2, asked: 2, failed: Vec::new() };
    let silent = Error::silent("declare a queue", Duration::from_secs(30));
    assert_eq!(silent.to_string(), "the broker did not declare a queue: it gave no answer within 30s");
    // The code, whether it may have run, and whether trying again later can help.
    let rows = [
        (Error::Fault(Fault::new(Code::NotFound, "")), "NOT_FOUND", true, false),
        (Error::Fault(Fault::new(Code::Unavailable, "")), "UNAVAILABLE", true, true),
        (Error::NoService { service: text(), method: None }, "UNAVAILABLE", false, true),
        (Error::NoSubscriber { key: text() }, "UNAVAILABLE", false, true),
        (Error::Overloaded { what: text() }, "RESOURCE_EXHAUSTED", false, true),
        (Error::Unreachable { method: text(), queue: text() }, "UNAVAILABLE", false, true),
        (no_quorum, "UNAVAILABLE", true, true),
        (blocked(false), "UNAVAILABLE", false, true),
        (blocked(true), "UNAVAILABLE", true, true),
        (timeout(Unanswered::Unsent), "DEADLINE_EXCEEDED", false, true),
        (timeout(Unanswered::Unknown), "DEADLINE_EXCEEDED", true, true),
        (too_large("request"), "RESOURCE_EXHAUSTED", false, false),
        (too_large("reply"), "RESOURCE_EXHAUSTED", true, false),
        (disconnected(false), "UNAVAILABLE", false, true),
        (disconnected(true), "UNAVAILABLE", true, true),
        (Error::Connect { url: text(), reason: text() }, "UNAVAILABLE", false, true),
        (Error::Mismatch { name: text(), differences: Vec::new() }, "FAILED_PRECONDITION", false, false),
        (Error::refused("", "ACCESS_REFUSED"), "INTERNAL", false, false),
        (silent, "INTERNAL", true, false),
        (Error::Codec(CodecError(text())), "INVALID_ARGUMENT", false, false),
        (Error::UnreadableReply(CodecError(text())), "INTERNAL", true, false),
        (Error::Invalid(text()), "INVALID_ARGUMENT", false, false),
    ];
    let all = |code: Code, may_have_run: bool, is_transient: bool| (code.name(), may_have_run, is_transient);
    for (error, code, may_have_run, is_transient) in rows {
        let said = all(error.code(), error.may_have_run(), error.is_transient());
        assert_eq!(said, (code, may_have_run, is_transient), "{error:?}");
        assert_eq!(error.retry_after(), None);
        // Beside a method's own error it says the same.
        let error = CallError::<String>::from(error);
        let said = all(error.code(), error.may_have_run(), error.is_transient());
        assert_eq!(said, (code, may_have_run, is_transient), "{error:?}");
    }
    let own = CallError::Service("no");
    assert_eq!(all(own.code(), own.may_have_run(), own.is_transient()), ("UNKNOWN", true, false));
    assert_eq!(own.retry_after(), None);
    let wait = Duration::from_secs(3);
    let fault = || Error::Fault(Fault::new(Code::Unavailable, "").retry_after(wait));
    assert_eq!((fault().retry_after(), CallError::<()>::Failed(fault()).retry_after()), (Some(wait), Some(wait)));
}

#[test]
fn what_main_prints_is_the_variants_name_and_a_sentence() {
    let error = || Error::NoService { service: "demo.v1".into(), method: None };
    let said = "NoService: nobody serves `demo.v1`: is a server running, and on the same namespace?";
    assert_eq!(format!("{:?}", error()), said);
    assert_eq!(format!("{:?}", CallError::<u8>::Failed(error())), said);
    assert_eq!(format!("{:?}", CallError::Service(7)), "Service(7)");
}

#[test]
fn an_error_becomes_that_of_a_method_with_an_error_of_its_own() {
    fn inner() -> Result<(), Error> {
        Err(Error::Invalid("no".to_owned()))
    }
    fn outer() -> Result<(), CallError<u8>> {
        inner()?;
        Ok(())
    }
    fn boxed() -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        outer()?;
        Ok(())
    }
    assert!(matches!(outer(), Err(CallError::Failed(Error::Invalid(_)))));
    assert_eq!(boxed().map_err(|error| error.to_string()), Err("no".to_owned()));
}

#[test]
fn the_error_of_an_attempt_never_says_that_the_call_has_not_run_if_another_attempt_may_have() {
    let text = String::new;
    let not_run = [
        Error::NoService { service: "demo.v1".into(), method: None },
        Error::NoSubscriber { key: "order.created".into() },
        Error::Overloaded { what: "its queue is full".into() },
        Error::Blocked { method: None, reason: text(), after: Duration::ZERO, may_have_run: false },
        Error::Timeout { method: text(), after: Duration::ZERO, why: Unanswered::Unsent },
        Error::Disconnected { method: None, may_have_run: false, reason: text() },
        Error::TooLarge { what: "request", size: 2, limit: 1, whose: "client's" },
        Error::Invalid("a bad name".into()),
    ];
    for error in not_run {
        assert!(!error.may_have_run(), "{error:?}");
        let (is_transient, said) = (error.is_transient(), error.to_string());
        let error = error.after_another_attempt();
        assert!(error.may_have_run() && error.is_transient() == is_transient, "{error:?}");
        if let Error::Fault(fault) = error {
            assert!(fault.message.contains("another attempt") && fault.message.ends_with(&said), "{fault}");
        }
    }
    let sure = Error::Timeout { method: text(), after: Duration::ZERO, why: Unanswered::Unserved };
    assert!(matches!(sure.after_another_attempt(), Error::Timeout { why: Unanswered::Unserved, .. }));
}
