//! Connections that the broker refuses, each with an error that says what to change; and the names of those that it
//! accepts.

use hopline::{Client, DeadLetters, Error, Server};

use super::LONG;
use super::node::shared;
use crate::node::{Node, when};
use crate::proxy::Proxy;
use crate::support::{Calculator, MathClient, MathServer, soon};

/// The error of a server that connects to this virtual host as this user. The user's password is its name.
async fn reason(node: &Node, user: &str, vhost: &str) -> String {
    let url = format!("amqp://{user}:{user}@{}/{vhost}", node.address());
    match soon(Server::connect(&url)).await {
        Err(Error::Connect { url, reason, .. }) => {
            assert_eq!(url, format!("amqp://{}/{vhost}", node.address()));
            reason
        }
        other => panic!("expected no connection, not {other:?}"),
    }
}

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn a_limit_that_is_reached_is_named_with_what_raises_it() {
    let node = shared().await;
    node.ctl(&["add_vhost", "narrow"]).await;
    node.ctl(&["set_permissions", "-p", "narrow", "guest", ".*", ".*", ".*"]).await;
    for (most, said) in [("0", "connection limit (0)"), ("1", "connection limit (1)")] {
        node.ctl(&["set_vhost_limits", "-p", "narrow", &format!("{{\"max-connections\": {most}}}")]).await;
        let reason = reason(&node, "guest", "narrow").await;
        let expected = "the virtual host has as many connections as it may: close some, or raise the limit with \
                        `rabbitmqctl set_vhost_limits -p narrow` (";
        assert!(reason.starts_with(expected) && reason.contains(said), "{reason}");
    }
    node.ctl(&["clear_vhost_limits", "-p", "narrow"]).await;
    node.ctl(&["add_user", "few", "few"]).await;
    node.ctl(&["set_permissions", "-p", "narrow", "few", ".*", ".*", ".*"]).await;
    for (limit, what) in [("max-connections", "connections as it may"), ("max-channels", "channels open as it may")] {
        node.ctl(&["set_user_limits", "few", &format!("{{\"{limit}\": 0}}")]).await;
        let reason = reason(&node, "few", "narrow").await;
        assert!(reason.starts_with(&format!("the user has as many {what}")), "{reason}");
        assert!(reason.contains("`rabbitmqctl set_user_limits`"), "{reason}");
        node.ctl(&["clear_user_limits", "few", limit]).await;
    }
    node.ctl(&["delete_user", "few"]).await;
    node.ctl(&["delete_vhost", "narrow"]).await;
    node.nothing_left().await;
}

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn a_virtual_host_that_is_closed_is_told_from_one_that_is_not_there() {
    let node = shared().await;
    node.ctl(&["add_vhost", "closed"]).await;
    let closed = reason(&node, "guest", "closed").await;
    assert!(closed.starts_with("the virtual host `closed` is closed to this user: give it permissions"), "{closed}");
    node.ctl(&["delete_vhost", "closed"]).await;
    let absent = reason(&node, "guest", "closed").await;
    assert!(absent.starts_with("there is no virtual host `closed`"), "{absent}");
}

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn a_login_that_the_broker_does_not_offer_is_named() {
    let node = shared().await;
    let mechanisms = |names: &str| format!("application:set_env(rabbit, auth_mechanisms, {names}).");
    node.eval(&mechanisms("['AMQPLAIN']")).await;
    // The broker waits three seconds before it refuses by closing the connection.
    let outcome = soon(Client::builder().connect_timeout(LONG).connect(node.url())).await;
    node.eval(&mechanisms("['PLAIN', 'AMQPLAIN']")).await;
    match outcome {
        Err(Error::Connect { reason, .. }) => {
            assert!(reason.contains("does not offer the `auth_mechanism`"), "{reason}")
        }
        other => panic!("{other:?}"),
    }
    let by_amqplain = soon(Client::connect(&format!("{}?auth_mechanism=amqplain", node.url()))).await;
    by_amqplain.expect("it is offered").close().await;
}

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn the_broker_shows_who_is_connected() {
    let node = shared().await;
    let scene = node.scene();
    let process = std::process::id();
    let server = Server::builder().namespace(&scene.namespace).name("billing").connect(&scene.url).await;
    let running = server.expect("it is there").serve(MathServer::new(Calculator)).start().await.expect("served");
    let client = Client::builder().namespace(&scene.namespace).name("billing-web").connect(&scene.url).await;
    let client = client.expect("it is there");
    let dead = DeadLetters::builder().namespace(&scene.namespace).name("alice").connect(&scene.url, "math").await;
    let dead = dead.expect("it is there");
    let names = when(async || node.connection_names().await, |names| names.len() == 5).await;
    let count = |name: String| names.iter().filter(|shown| **shown == name).count();
    // A server has one connection to publish and one to consume.
    assert_eq!(count(format!("billing server {process} {}", running.instance())), 2, "{names:?}");
    assert_eq!(count(format!("alice operator {process}")), 2, "{names:?}");
    let of_client = names.iter().find_map(|name| name.strip_prefix(&format!("billing-web client {process} ")));
    assert_eq!(of_client.map(str::len), Some(12), "{names:?}");
    tokio::join!(client.close(), dead.close(), running.drain());
    // Without a name in the settings, the program's name is used.
    let client = scene.client().await;
    let names = when(async || node.connection_names().await, |names| names.len() == 1).await;
    assert!(names[0].starts_with("it-") && names[0].contains(&format!(" client {process} ")), "{names:?}");
    client.close().await;
    node.nothing_left().await;
}

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn a_broker_at_an_ipv6_address_is_one_like_any_other() {
    let node = shared().await;
    let scene = node.scene();
    let proxy = Proxy::at("[::1]:0", node.address()).await;
    let scene = scene.by_way_of(proxy.url());
    let running = scene.serve(MathServer::new(Calculator)).await;
    let client = scene.client().await;
    assert_eq!(soon(MathClient::new(&client).add(2, 3).into_future()).await.expect("answered"), 5);
    assert_eq!(proxy.open(), 3, "all of them by way of it");
    client.close().await;
    soon(running.drain()).await;
    node.nothing_left().await;
}
