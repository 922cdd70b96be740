<?php

// Values keep their shape on the way through.

declare(strict_types=1);

use Durable\Worker\BigInteger;
use Durable\Worker\Json;
use Durable\Worker\Unreadable;

test('JSON comes back as it went', static function (): void {
    $texts = [
        '{}', '[]', '[{},[]]', '{"a":{}}', '1.0', '1', '-0.5', '0.1', '1.0e+25', 'null', '""', '{"":1,"0":2}', 'true',
        '9223372036854775807', '-9223372036854775808', '9223372036854775808', '-12345678901234567890123',
        '[12345678901234567890123,1.5,{"n":98765432109876543210}]',
        '{"12345678901234567890":"12345678901234567890","a\\\\":"\\"12345678901234567890"}',
        '"ünï ☃ 𝄞 / \\" \\\\ \\n"', '0.12345678901234568', '"a 1234567890123456789012 b"',
    ];
    foreach ($texts as $text) {
        same($text, Json::encode(Json::decode($text)));
    }
});

test('a number beyond PHP\'s integers is its digits', static function (): void {
    $value = Json::decode('{"n": 12345678901234567890123}');
    same('12345678901234567890123', (string) $value->n);
    same('[-99999999999999999999]', Json::encode([new BigInteger('-99999999999999999999')]));
    throws(ValueError::class, static fn () => new BigInteger('1.5'));
});

test('what is not JSON is unreadable', static function (): void {
    foreach (['', '{', 'nope', '"\ud800"', "\"\xff\"", '[00001234567890123456789]', '{"\u0000a":1}'] as $text) {
        throws(Unreadable::class, static fn () => Json::decode($text));
    }
});

test('a large text with a large number is read', static function (): void {
    $text = json_encode([str_repeat('ünï "\\ ', 200_000)]);
    $value = Json::decode('[12345678901234567890123,' . $text . ']');
    same(200_000 * 9, strlen($value[1][0]));
});

test('words are UTF-8, without NUL, and not too many', static function (): void {
    same("a\u{FFFD}b", Json::words("a\xffb", 10));
    same("a\u{FFFD}b", Json::words("a\0b", 10));
    same('☃☃', Json::words('☃☃☃', 2));
});
