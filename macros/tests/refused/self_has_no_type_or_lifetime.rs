#[hopline::service]
trait Demo {
    async fn put(self: &Self);
    async fn arc(self: Arc<Self>);
    async fn lifetime(&'static self);
}

fn main() {}
