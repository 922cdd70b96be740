<?php

// Functions over HTTP: the golden vectors, how a call ends, what is refused, and the client.

declare(strict_types=1);

use Durable\Functions\App;
use Durable\Functions\Client;
use Durable\Functions\Definition;
use Durable\Functions\Event;
use Durable\Functions\Failed;
use Durable\Functions\ServiceError;
use Durable\Functions\Signature;
use Durable\Functions\Step;
use Durable\Worker\Json;
use Durable\Worker\NonRetryable;

$folder = (getenv('PROTOCOL_FOLDER') ?: __DIR__ . '/../../../protocol') . '/vectors/functions';
$load = static fn (string $file): stdClass => Json::decode((string) file_get_contents("$folder/$file"));

/** The operation that a function reaches. */
$reached = static function (Closure $handler, array $steps = []): stdClass {
    $app = new App('shop', [new Definition('f', $handler, event: 'go')]);
    $call = ['runId' => 'r-1', 'functionId' => 'f', 'event' => ['id' => 'e', 'name' => 'go', 'data' => null], 'steps' => (object) $steps];

    return Json::decode($app->answer('POST', [], Json::encode($call))[1]);
};

$fulfil = new Definition(
    'fulfil',
    event: 'order/created',
    version: '2',
    handler: static function (Step $step, Event $event): array {
        $id = $event->data->id;
        $charge = $step->run('charge', static fn (): array => ['receipt' => "r-$id"]);
        $step->sleepUntil('nap', new DateTimeImmutable('2026-01-01T01:00:00+01:00'));
        $packed = $step->waitForEvent('packed', 'order/packed', match: ['id' => $id], timeout: '1 hour');
        $step->sendEvent('tell', ['name' => 'order/told', 'data' => ['id' => $id]]);

        return ['receipt' => $charge->receipt, 'box' => $packed?->data->box, 'by' => $packed?->name];
    },
    onFailure: static function (Step $step, Event $event, Failed $failed): void {
        $step->run('apologise', static fn (): string => "sorry for $failed->stepId: $failed->message");
    },
);
$app = new App('shop', [$fulfil]);

test('signatures of bodies are those of everybody', static function () use ($load): void {
    foreach ($load('signature.json')->signatures as $golden) {
        same($golden->header, Signature::of($golden->body, $golden->key), $golden->name);
    }
});

foreach ($load('conversation.json')->passes as $pass) {
    test("the golden conversation: $pass->name", static function () use ($pass, $app): void {
        $found = Json::decode($app->answer('POST', [], Json::encode($pass->call))[1]);
        if (($pass->answer->until ?? '') === '*') {
            $pass->answer->until = $found->until;
        }
        same($pass->answer, $found);
    });
}

foreach (['valid' => 200, 'invalid' => 400] as $kind => $status) {
    foreach ($load('call.json')->{$kind} as $vector) {
        test("a call: $vector->name is $kind", static function () use ($vector, $status, $app): void {
            same($status, $app->answer('POST', [], Json::encode($vector->message))[0]);
        });
    }
}

test('no catch of a function sees the end of its call, and what finally does is too late', static function () use ($reached): void {
    $answer = $reached(static function (Step $step): string {
        try {
            $step->sleep('nap', 60);
        } catch (Throwable) {
            return 'swallowed';
        } finally {
            $step->run('clean', static fn (): int => 1);
        }

        return 'swallowed';
    });
    same(['sleep', 'nap'], [$answer->op, $answer->id]);
});

test('memos are given back as JSON has them, null included', static function () use ($reached): void {
    $answer = $reached(
        static fn (Step $step): array => [$step->run('1', static fn () => 2), $step->run('none', static fn () => 2), $step->waitForEvent('w', 'x')],
        ['1' => ['type' => 'run', 'data' => new stdClass()], 'none' => ['type' => 'run', 'data' => null], 'w' => ['type' => 'wait', 'data' => null]],
    );
    same([new stdClass(), null, null], $answer->data);
});

$known = ['a' => ['type' => 'run', 'data' => 1]];
$mistakes = [
    'one id for two operations' => [static fn (Step $step) => [$step->run('a', static fn () => 1), $step->run('a', static fn () => 2)], $known, 'duplicate_step', null],
    'one id for two types' => [static fn (Step $step) => $step->sleep('a', 1), $known, 'step_type_changed', null],
    'no id' => [static fn (Step $step) => $step->run('', static fn () => 1), [], 'bad_step_id', null],
    'an operation in a step' => [static fn (Step $step) => $step->run('a', static fn () => $step->sleep('b', 1)), [], 'nested_step', 'a'],
    'no length of time' => [static fn (Step $step) => $step->sleep('a', 'soon enough'), [], 'bad_duration', null],
    'what is no JSON' => [static fn (Step $step) => $step->run('a', static fn () => "\xff"), [], 'payload_type', 'a'],
    'more than fits' => [static fn (Step $step) => $step->run('a', static fn () => str_repeat('x', 1 << 20)), [], 'payload_too_large', 'a'],
];
foreach ($mistakes as $name => [$handler, $steps, $code, $id]) {
    test("a mistake is told, and not tried again: $name", static function () use ($reached, $handler, $steps, $code, $id): void {
        $answer = $reached($handler, $steps);
        same(['error', $code, $id, false], [$answer->op, $answer->code, $answer->id, $answer->retryable]);
    });
}

test('what is thrown is told: of a step with its id, outside without', static function () use ($reached): void {
    $inside = $reached(static fn (Step $step) => $step->run('a', static fn () => throw new NonRetryable('no', 'c', [1])));
    same(['a', 'no', 'c', [1], false], [$inside->id, $inside->message, $inside->code, $inside->details, $inside->retryable]);
    $outside = $reached(static fn () => throw new RangeException('flaky'));
    same([null, 'flaky', 'RangeException', true], [$outside->id, $outside->message, $outside->name, $outside->retryable]);
});

test('definitions that make no sense are refused', static function () use ($fulfil): void {
    $handler = static fn (): int => 1;
    throws(ValueError::class, static fn () => new Definition('a@1', $handler, event: 'e'));
    throws(ValueError::class, static fn () => new Definition('a', $handler));
    throws(ValueError::class, static fn () => new Definition('a', $handler, event: 'e', cron: '* * * * *'));
    throws(ValueError::class, static fn () => new Definition('a', $handler, event: 'e', retries: 21));
    throws(ValueError::class, static fn () => new App('shop', [$fulfil, $fulfil]));
});

test('while a key is changed either counts, and the answer has the same', static function () use ($fulfil, $load): void {
    $app = new App('shop', [$fulfil], ['new', 'old']);
    $body = Json::encode($load('call.json')->valid[0]->message);
    foreach (['new' => 200, 'old' => 200, 'third' => 401] as $key => $expected) {
        [$status, $answer, $headers] = $app->answer('POST', [Signature::HEADER => Signature::of($body, $key)], $body);
        same($expected, $status);
        same($status === 200, $headers[Signature::HEADER] === Signature::of($answer, $key));
    }
});

test('the manifest is for who signs the time, and says who the app is only where that is wanted', static function () use ($fulfil): void {
    $app = new App('shop', [$fulfil], ['k'], 'shop.dev');
    $get = static function (float $time, array $more = []) use ($app): array {
        $text = (string) (int) ($time * 1000);

        return $app->answer('GET', [Signature::TIMESTAMP => $text, Signature::HEADER => Signature::of($text, 'k')] + $more, '');
    };
    same(401, $get(microtime(true) - 301)[0]);
    same(['functions', 'sdkVersion'], array_keys(get_object_vars(Json::decode($get(microtime(true))[1]))));
    $found = Json::decode($get(microtime(true), ['x-durable-discovery' => 'true'])[1]);
    same(['shop.dev', 'shop', 'k', true], [$found->appId, $found->appName, $found->signingKey, $found->functions[0]->hasOnFailure]);
});

test('what is no call is refused', static function () use ($app, $load): void {
    $call = Json::encode($load('call.json')->valid[0]->message);
    same(413, $app->answer('POST', [], str_repeat('x', App::BODY_MAX + 1))[0]);
    same(405, $app->answer('PUT', [], '')[0]);
    same(400, $app->answer('POST', [], 'no json')[0]);
    same(404, $app->answer('POST', [], str_replace('fulfil@2', 'other', $call))[0]);
});

/** A client whose service answers these, one after the other, and what it has asked. */
$clientOf = static function (array $answers): array {
    $calls = new ArrayObject();
    $post = static function (string $url, string $body, array $headers) use (&$answers, $calls): array {
        $calls[] = [$url, $body, $headers];
        [$status, $text, $key] = array_shift($answers) + [0, '{}', 'k'];

        return [$status, $text, [Signature::HEADER => Signature::of($text, $key)]];
    };

    return [new Client('http://s/', 'shop.dev', 'k', post: $post), $calls];
};

test('408, 429 and 5xx are asked for again, with the same event id', static function () use ($clientOf): void {
    [$client, $calls] = $clientOf([[503], [429], [408], [200, '{"eventId":"e"}']]);
    same('e', $client->send('go')->eventId);
    same(4, count($calls));
    same(1, count(array_unique(array_column($calls->getArrayCopy(), 1))));
    [$url, $body, $headers] = $calls[3];
    same(['http://s/e', 'shop.dev', Signature::of($body, 'k')], [$url, $headers['x-durable-app'], $headers[Signature::HEADER]]);
});

test('any other status is an answer', static function () use ($clientOf): void {
    foreach ([400, 401, 404, 409, 301] as $status) {
        [$client, $calls] = $clientOf([[$status, '{"error":{"code":"why","message":"no"}}']]);
        $error = throws(ServiceError::class, static fn () => $client->cancel('r'));
        same([$status, 'why', 1], [$error->getCode(), $error->errorCode, count($calls)]);
    }
});

test('an answer that another key has signed is not believed', static function () use ($clientOf): void {
    [$client] = $clientOf([[200, '{}', 'another']]);
    same('bad_signature', throws(ServiceError::class, static fn () => $client->run('r'))->errorCode);
});
